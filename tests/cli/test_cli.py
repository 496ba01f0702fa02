"""The command line, as a person meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from called_ops import change_results
from torch import nn
from typer.testing import CliRunner

import fusedres
from fusedres import __main__ as entry
from fusedres.cli import explain
from fusedres.cli.app import app
from fusedres.models import MODELS, BasicBlock
from fusedres.ops import selftest
from fusedres.ops.cases import SMALL
from fusedres.ops.contract import BnScaleShift
from fusedres.ops.native import library
from fusedres.patching.reasons import describe

run = CliRunner().invoke


def command(monkeypatch, capsys, *arguments: str) -> tuple[object, str, str]:
    """What `fusedres ARGUMENTS` exits with and writes."""
    monkeypatch.setattr(sys, "argv", ["fusedres", *arguments])
    with pytest.raises(SystemExit) as exit:
        entry.main()
    return (exit.value.code, *capsys.readouterr())


@pytest.fixture
def without_typer(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "fusedres.cli.app")
    monkeypatch.setattr(selftest, "SMALL", SMALL[:1])


def test_the_package_is_the_command():
    environment = {**os.environ, "COLUMNS": "80"}
    shown = subprocess.run(
        [sys.executable, "-m", "fusedres", "--help"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "Usage: fusedres " in shown and all(
        name in shown for name in ("doctor", "explain", "compare", "tune")
    )


@pytest.mark.parametrize("arguments", [(), ("explain", "fusedres:resnet18"), ("--help",), ("doctor", "--no")])
def test_without_its_library_a_command_says_what_to_install(monkeypatch, capsys, without_typer, arguments):
    code, out, _ = command(monkeypatch, capsys, *arguments)
    assert (
        not out and isinstance(code, str) and "\n" not in code
    )  # what Python writes to stderr, with exit code 1
    assert "pip install 'fusedres[cli]'" in code


def test_the_version(monkeypatch, capsys):
    assert command(monkeypatch, capsys, "--version") == (0, f"fusedres {fusedres.__version__}\n", "")


def test_without_its_library_the_version_is_still_told(monkeypatch, capsys, without_typer):
    assert command(monkeypatch, capsys, "--version") == (0, f"fusedres {fusedres.__version__}\n", "")


def test_without_its_library_doctor_works(monkeypatch, capsys, without_typer):
    code, out, _ = command(monkeypatch, capsys, "doctor")
    assert code == 0 and out.endswith("the self-test passed\n")
    code, out, _ = command(monkeypatch, capsys, "doctor", "--json")
    assert code == 0 and json.loads(out)["passed"]


def test_another_missing_module_is_no_matter_of_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fusedres.cli.app", None)
    with pytest.raises(ModuleNotFoundError, match=r"fusedres\.cli"):
        entry.main()


def test_explain_shows_every_block():
    result = run(app, ["explain", "fusedres:resnet18", "--recipe", "separate"])
    assert result.exit_code == 0
    assert "matched 9 of 9 blocks" in result.output and "layer4.1" in result.output


def test_explain_shows_names_whole_however_narrow_the_terminal():
    result = run(app, ["explain", "hf:resnet-18"], env={"COLUMNS": "40"})
    lines = result.output.splitlines()
    names = [line.split()[0] for line in lines if " ResNetBasicLayer " in line]
    assert names == [
        f"resnet.encoder.stages.{stage}.layers.{layer}" for stage in range(4) for layer in (0, 1)
    ]


def test_explain_says_what_each_block_runs_as_on_a_batch():
    arguments = ["explain", "fusedres:cifar_resnet20", "--batch", "2", "--size", "8"]
    result = run(app, arguments)
    title = "fusedres:cifar_resnet20, model channels_last, input 2 x 3 x 8 x 8 channels_last"
    assert result.output.startswith(f"{title}\n")
    rows = [line for line in result.output.splitlines() if " BasicBlock " in line]
    code = "too_small" if library.is_built() else "native_missing"
    assert len(rows) == 9 and all(row.count(f"unfused [{code}") == 2 for row in rows)
    assert result.output.count(f"\n  {code}: {describe(code)}\n") == 1
    calls = json.loads(run(app, [*arguments, "--recipe", "separate", "--json"]).output)["calls"]
    assert {b["runs_as"] for phase in ("training", "inference") for b in calls[phase]} == {"separate"}


def test_explain_says_why_a_block_is_left_alone(monkeypatch):
    mixed = nn.Sequential(BasicBlock(3, 3, activation=nn.SiLU), BasicBlock(3, 3))
    monkeypatch.setitem(MODELS, "mixed", lambda: mixed)
    for options in ([], ["--batch", "2", "--size", "8"]):
        result = run(app, ["explain", "fusedres:mixed", *options])
        assert result.exit_code == 0 and "matched 1 of 2 blocks" in result.output
        assert "left alone [activation_not_relu" in result.output


@pytest.mark.skipif(not library.is_built(), reason="no compiled library in this installation")
def test_explain_says_how_convolutions_run():
    arguments = ["explain", "fusedres:cifar_resnet20", "--accuracy"]
    expected = {"fast": "Winograd F(4x4, 3x3)", "strict": "Winograd F(2x2, 3x3)"}
    for accuracy, algorithm in expected.items():
        assert f"3x3 convolutions of float32 without stride on this CPU: {algorithm}" in (
            run(app, [*arguments, accuracy]).output
        )
    off = run(app, [*arguments, "fast", "--json"], env={"FUSEDRES_WINOGRAD": "0"}).output
    assert "torch's own (FUSEDRES_WINOGRAD=0)" in json.loads(off)["convolutions"]
    wrong = run(app, [*arguments, "exact"])
    assert wrong.exit_code == 2 and "accuracy 'exact' is unknown" in wrong.output


def test_explain_prints_json():
    result = run(app, ["explain", "fusedres:cifar_resnet29", "--recipe", "gram", "--json"])
    data = json.loads(result.output)
    assert data["matched"] == data["total"] == 10
    assert {block["recipe"] for block in data["blocks"]} == {"gram"}


def test_explain_takes_models_of_other_libraries():
    result = run(app, ["explain", "hf:resnet-18", "--json"])
    data = json.loads(result.output)
    assert data["matched"] == data["total"] == 9
    assert data["blocks"][0]["form"] == "stem: conv-bn-relu-maxpool"


def test_verify_shows_checks_and_exits_by_them(monkeypatch):
    arguments = ["verify", "fusedres:cifar_resnet20", "--size", "8", "--recipe", "separate"]
    result = run(app, [*arguments, "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["passed"]
    change_results(monkeypatch, BnScaleShift, lambda v: v._replace(scale=v.scale * 1.01))
    result = run(app, arguments)
    assert result.exit_code == 1 and "FAIL" in result.output


def test_verify_says_that_nothing_was_compared():
    arguments = ["verify", "fusedres:cifar_resnet20", "--size", "8", "--recipe", "auto"]
    code = "too_small" if library.is_built() else "native_missing"
    sentence = f"nothing was compared, for no block ran fused ({code}: 10)"
    result = run(app, arguments)
    assert result.exit_code == 3 and result.stdout == f"{sentence}\n"
    result = run(app, [*arguments, "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 3 and found["sentence"] == sentence and not found["passed"]
    assert found["reasons"] == {code: 10}


def test_compare_ends_with_a_sentence():
    arguments = ["compare", "fusedres:cifar_resnet20", "--size", "8", "--batch", "2", "--rounds", "2"]
    result = run(app, [*arguments, "--recipe", "separate"])
    assert result.exit_code == 0 and result.output.splitlines()[-1].startswith("patched trains ")
    data = json.loads(run(app, [*arguments, "--recipe", "unfused", "--json"]).stdout)
    assert [phase["phase"] for phase in data["phases"]] == ["training", "inference"]


def test_the_title_says_the_layouts_that_are_there():
    model, images = nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8)
    assert explain.title("m", model, images) == "m, model NCHW, input 2 x 3 x 8 x 8 NCHW"
    images = images.to(memory_format=torch.channels_last)
    assert explain.title("m", model, images) == "m, model NCHW, input 2 x 3 x 8 x 8 channels_last"
    assert explain.title("m", model, images[:0]) == "m, model NCHW"


def test_explain_shows_the_table_of_ops_on_request():
    arguments = ["explain", "fusedres:cifar_resnet20"]
    table = "which backend serves an op"
    assert table not in run(app, arguments).output
    assert table in run(app, [*arguments, "--ops"]).output


def test_bad_names_are_explained():
    for arguments, message in (
        (["explain", "resnet50"], "fusedres:resnet50"),
        (["explain", "fusedres:resnet51"], "choose from"),
        (["explain", "fusedres:resnet18", "--recipe", "fast"], "unknown"),
        (["explain", "fusedres:cifar_resnet20", "--size", "-3"], "--size"),
    ):
        result = run(app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 2 and message in result.output


def test_what_is_refused_is_one_line_that_can_be_copied(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    result = run(app, ["explain", "timm:resnet50"], env={"COLUMNS": "40"})
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr == "fusedres: timm is not installed: pip install timm\n"


@pytest.mark.parametrize(
    "arguments",
    [["explain"], ["explain", "--batch", "1"], ["verify"], ["compare", "--recipe", "gram"], ["tune"]],
)
def test_an_absent_backend_of_the_environment_is_explained(monkeypatch, arguments):
    monkeypatch.setenv("FUSEDRES_BACKEND", "abacus")
    name, *options = arguments
    result = run(app, [name, "fusedres:cifar_resnet20", *options], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and "'abacus' is not available" in result.output
