"""fusedres tune: measures, rejects what is wrong, writes the table that recipe "auto" then follows."""

from __future__ import annotations

import json

import pytest
import torch
from block_forms import basic, bottleneck, projection
from called_ops import change_results
from torch import nn
from typer.testing import CliRunner

import fusedres
from fusedres.blocks import user_table
from fusedres.cli import progress
from fusedres.cli import tune as tune_command
from fusedres.cli.app import app
from fusedres.measuring import tune as tuning
from fusedres.measuring.tune import Timing, Tuned, tune
from fusedres.models import Bottleneck
from fusedres.ops.contract import BnAddReluBackwardInput, BnAddReluForward


@pytest.fixture
def table_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDRES_TABLE", str(tmp_path / "table.json"))
    user_table.forget()
    yield tmp_path / "table.json"
    user_table.forget()


def features(channels):
    return torch.randn(2, channels, 6, 6).to(memory_format=torch.channels_last)


def bottlenecks():
    """Two blocks of one class, and one of another."""
    wider = Bottleneck(32, 16, 1, projection(32, 64))
    return nn.Sequential(bottleneck()(), bottleneck()(), wider)


def one_basic():
    return nn.Sequential(basic()())


def fake_clock(monkeypatch, times: dict[str, float]):
    """Seconds by the recipe that a step last ran; the step runs all the same."""

    def seconds(run, device):
        run()
        return times[run.recipe]

    plain = tuning.step_of

    def step_of(place, module, gradients):
        step = plain(place, module, gradients)

        def run():
            y = step()
            rows = fusedres.report(module).matched if fusedres.is_patched(module) else ()
            run.recipe = rows[0].runs_as if rows else "unfused"
            return y

        return run

    monkeypatch.setattr(tuning, "seconds", seconds)
    monkeypatch.setattr(tuning, "step_of", step_of)


@pytest.mark.parametrize(
    ("fastest", "gradients"), [("separate", False), ("gram", True), ("unfused", True)], ids=str
)
def test_the_fastest_recipe_is_taken_and_auto_follows(monkeypatch, table_file, fastest, gradients):
    times = {"unfused": 2.0, "separate": 3.0, "prologue": 3.5, "gram": 4.0, fastest: 1.0}
    model, x = bottlenecks().train(gradients), features(32)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with monkeypatch.context() as patching:
        fake_clock(patching, times)
        found = tune(model, x, gradients=gradients, backend="reference", rounds=5)
    assert not fusedres.is_patched(model) and model.training is gradients
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [tuned.blocks for tuned in found] == [("0", "1"), ("2",)]
    user_table.write({tuned.key: tuned.entry for tuned in found})
    fusedres.patch(model, backend="reference")
    with torch.set_grad_enabled(gradients):
        model(x)
    assert [row.runs_as for row in fusedres.report(model).matched] == [fastest] * 3


def test_a_wrong_recipe_is_rejected(monkeypatch):
    change_results(monkeypatch, BnAddReluForward, lambda result: (result[0] * 1.01, result[1]))
    monkeypatch.setattr(tuning, "seconds", lambda run, device: 1.0)
    found = tune(one_basic(), features(16), backend="reference", rounds=5)
    for tuned in found:
        assert "eager has" in tuned.rejected["separate"]
        assert tuned.rejected["gram"] == "no_1x1_expansion"
        assert tuned.entry.recipe == "unfused"


def test_a_recipe_with_infinite_gradients_is_rejected(monkeypatch):
    change_results(monkeypatch, BnAddReluBackwardInput, lambda result: (result[0] / 0, result[1]))
    monkeypatch.setattr(tuning, "seconds", lambda run, device: 1.0)
    found = tune(one_basic(), features(16), backend="reference", rounds=5)
    assert {tuned.rejected["separate"] for tuned in found} == {"a gradient is not finite"}


def test_doubt_leaves_a_block_unfused():
    timings = (Timing("separate", 1.0, 1.2, 0.99, 1.3), Timing("unfused", 1.2, 1.0, 1.0, 1.0))
    key = user_table.Key("", "", "", "", True, "")
    assert Tuned(key, ("a",), timings, {}).entry.recipe == "unfused"
    sure = Timing("separate", 1.0, 1.2, 1.01, 1.3)
    assert Tuned(key, ("a",), (sure, timings[1]), {}).entry == user_table.Entry("separate", 1.2)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(fusedres.UnsupportedModelError, match="residual block"):
        tune(nn.Sequential(nn.Conv2d(16, 16, 1)), features(16))


@pytest.mark.parametrize("rounds", [0, 4])
def test_too_few_rounds_are_refused(rounds):
    with pytest.raises(ValueError, match=rf"found {rounds} rounds, needed at least 5: .* interval"):
        tune(one_basic(), features(16), rounds=rounds)


def test_progress_is_told_between_rounds():
    told = []
    found = tune(one_basic(), features(16), rounds=5, progress=lambda *step: told.append(step))
    assert len(found) == 1 and {what for what, _, _ in told} == {"measuring 0"}
    assert sorted({done for _, done, _ in told}) == [0, 1, 2, 3, 4, 5] and {n for *_, n in told} == {5}


SMALL = ["tune", "fusedres:cifar_resnet20", "--batch", "2", "--size", "8", "--rounds", "5"]
SMALL += ["--backend", "reference"]


def invoke(*arguments):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def test_command_writes_shows_and_clears_the_table(table_file):
    result = invoke(*SMALL)
    assert result.exit_code == 0, result.output
    assert "6 classes of block" in result.stdout and str(table_file) in result.stdout
    kept = user_table.read(table_file)
    assert len(kept) == 6
    title, heads, *rows = invoke("tune", "--show").stdout.splitlines()
    assert title == f"{table_file}, 6 classes of block" and len(rows) == 6
    for row, (key, entry) in zip(rows, kept.items(), strict=True):
        assert row.index(key.call) == heads.index("call")
        assert row[heads.index("recipe") :].startswith(entry.recipe)
    shown = json.loads(invoke("tune", "--show", "--json").stdout)
    assert shown["path"] == str(table_file) and shown["exists"]
    assert [user_table.Key(**entry["key"]) for entry in shown["entries"]] == list(kept)
    result = invoke("tune", "--clear")
    assert result.exit_code == 0 and result.stdout == f"removing {table_file}, 6 classes of block\n"
    assert not table_file.exists()


def test_command_prints_json_and_nothing_else(table_file, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_APART", 0.0)
    result = invoke(*SMALL, "--json")
    found = json.loads(result.stdout)
    assert found["path"] == str(table_file) and len(found["classes"]) == 6
    assert found["classes"][0]["blocks"] == ["stem"]
    assert "tune: measuring stem, 5 of 30, " in result.stderr


def test_no_table_is_said_plainly(table_file):
    for option in ("--show", "--clear"):
        result = invoke("tune", option)
        assert result.exit_code == 0 and f"there is no table: {table_file} does not exist" in result.stdout
    assert json.loads(invoke("tune", "--show", "--json").stdout) == {
        "path": str(table_file),
        "exists": False,
        "entries": [],
    }


@pytest.mark.parametrize("option", ["--show", "--clear"])
@pytest.mark.parametrize("content", ["a thesis", '{"kind": "another"}', "[]"])
def test_what_is_no_table_is_neither_shown_nor_removed(table_file, option, content):
    table_file.write_text(content)
    result = invoke("tune", option)
    assert result.exit_code == 2 and f"{table_file} is no table of recipes" in result.stderr
    assert table_file.read_text() == content


def test_command_explains_a_table_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEDRES_TABLE", str(tmp_path / "file" / "table.json"))
    monkeypatch.setattr(tune_command, "tune", lambda *arguments, **options: [])
    result = CliRunner().invoke(app, ["tune", "fusedres:cifar_resnet20"], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and str(tmp_path / "file") in result.output


def test_command_explains_bad_options():
    for arguments, message in (
        (["tune", "resnet50"], "fusedres:resnet50"),
        (["tune"], "one of MODEL, --show and --clear"),
        (["tune", "--show", "--clear"], "one of MODEL, --show and --clear"),
        (["tune", "fusedres:cifar_resnet20", "--clear"], "one of MODEL, --show and --clear"),
        (["tune", "fusedres:cifar_resnet20", "--rounds", "4"], "found 4 rounds, needed at least 5"),
        (["tune", "fusedres:cifar_resnet20", "--dtype", "int8"], "bfloat16"),
        (["tune", "fusedres:cifar_resnet20", "--backend", "abacus"], "'abacus' is not available"),
        (["tune", "fusedres:cifar_resnet20", "--device", "nonsense"], "nonsense"),
        (["tune", "fusedres:cifar_resnet20", "--size", "-3"], "--size"),
        (["tune", "fusedres:cifar_resnet20", "--batch", "1", "--size", "4"], "more than 1 value per channel"),
    ):
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 2 and message in result.output
