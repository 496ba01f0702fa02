"""The command line, as a person meets it."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from fusedres.backends.reference import ReferenceOps
from fusedres.cli import app

run = CliRunner().invoke


def test_explain_shows_every_block():
    result = run(app, ["explain", "fusedres:resnet18", "--recipe", "separate"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    assert "matched 9 of 9 blocks" in result.output and "layer4.1" in result.output


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
    assert result.exit_code == 0 and json.loads(result.output)["passed"]
    right = ReferenceOps.bn_scale_shift
    monkeypatch.setattr(
        ReferenceOps, "bn_scale_shift", lambda self, mean, *rest: right(self, mean * 1.01, *rest)
    )
    result = run(app, arguments)
    assert result.exit_code == 1 and "FAIL" in result.output


def test_compare_ends_with_a_sentence():
    arguments = ["compare", "fusedres:cifar_resnet20", "--size", "8", "--batch", "2", "--rounds", "2"]
    result = run(app, [*arguments, "--recipe", "separate"])
    assert result.exit_code == 0 and result.output.splitlines()[-1].startswith("patched trains ")
    data = json.loads(run(app, [*arguments, "--recipe", "unfused", "--json"]).output)
    assert [phase["phase"] for phase in data["phases"]] == ["training", "inference"]


def test_an_absent_device_is_explained():
    result = run(app, ["verify", "fusedres:cifar_resnet20", "--device", "nonsense"], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and "nonsense" in result.output


def test_bad_names_are_explained():
    for arguments, message in (
        (["explain", "resnet50"], "fusedres:resnet50"),
        (["explain", "fusedres:resnet51"], "choose from"),
        (["explain", "fusedres:resnet18", "--recipe", "fast"], "unknown"),
    ):
        result = run(app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 2 and message in result.output
