"""The demo at a small size: every run made, every forced recipe run, the picture and the numbers written."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from called_ops import change_results
from typer.testing import CliRunner

import fusedres
from fusedres.blocks import machine
from fusedres.cli.app import app
from fusedres.cli.demo import data, digits, speed, training
from fusedres.measuring.compare import DECISIVE_ROUNDS, Comparison, summarise
from fusedres.models import cifar_resnet
from fusedres.ops.contract import BnAddReluForward


class Shown(NamedTuple):
    """A run of the command: what it printed, its results.json, and what the training of the digits gave."""

    stdout: str
    results: dict[str, Any]
    outcomes: list[digits.Outcome]


def use_small_models(patching):
    patching.setattr(speed, "CASES", (("Small", "fusedres:cifar_resnet20", 6),))
    patching.setattr(speed, "BATCH", 2)
    patching.setattr(speed, "SIZE", 16)


def demo(output, patching, *options):
    """The command, with what `digits.run` returned in it."""
    outcomes, run = [], digits.run
    patching.setattr(digits, "run", lambda *args: outcomes.extend(run(*args)) or outcomes)
    arguments = ["demo", "--output", str(output), "--epochs", "1", *options]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0
    return Shown(result.stdout, json.loads((output / "results.json").read_text()), outcomes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def whole(folder):
    """The whole command, on few images and a small model."""
    all_of_them = data.load()
    few = data.Digits(*(part[:n] for part, n in zip(all_of_them, (128, 128, 64, 64), strict=True)))
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(data, "load", lambda seed: few)
        patching.setattr(digits, "FLOAT64_STEPS", 2)
        use_small_models(patching)
        return demo(folder, patching)


def test_demo_runs_end_to_end(whole, folder):
    found = whole.results
    for name in ("curves.png", "speed.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    outcomes = found["digits"]
    assert [o["recipe"] for o in outcomes] == ["separate", "gram"]
    for outcome in outcomes:
        assert outcome["matched"] == outcome["blocks"] == outcome["fused"] == 10
        assert [len(run["losses"]) for run in outcome["runs"]] == [2, 2, 2]
        assert outcome["float64_distance"] <= 1e-9
    assert "time per step" not in whole.stdout, "forced recipes at tiny sizes show equality, not speed"
    assert found["speed"]["machine"] == machine.device_name(torch.device("cpu"))
    (model,) = found["speed"]["models"]
    assert [phase["phase"] for phase in model["phases"]] == ["training", "inference"]
    assert model["unpatched_bytes"] == model["patched_bytes"] > 0, "nothing runs fused at this size"
    (title,) = [line for line in whole.stdout.splitlines() if line.startswith("unpatched against patched")]
    assert title.endswith(f"16 x 16, batch 2, float32, channels_last, on {found['speed']['machine']}")
    for line in ("training step", "inference", "kept for backward"):
        assert f"  Small, {line}" in whole.stdout


def test_the_large_models_can_be_left_out(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "run", lambda epochs, progress: whole.outcomes)
    shown = demo(tmp_path, monkeypatch, "--no-speed")
    assert shown.results == {**whole.results, "speed": None} and "Small" not in shown.stdout
    assert (tmp_path / "curves.png").exists() and not (tmp_path / "speed.png").exists()


def test_the_large_models_are_those_of_the_first_lines():
    assert [name for _, name, _ in speed.CASES] == ["fusedres:resnet50", "fusedres:resnet18"]
    assert (speed.BATCH, speed.SIZE) == (16, 224) and 2 <= speed.CHECKED <= speed.BATCH
    assert all(rounds >= DECISIVE_ROUNDS for *_, rounds in speed.CASES)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    use_small_models(monkeypatch)
    monkeypatch.setattr(speed, "compare", partial(speed.compare, recipe="separate", backend="reference"))
    change_results(monkeypatch, BnAddReluForward, lambda result: (result[0] * 1.001, result[1]))
    with pytest.raises(fusedres.VerificationError, match="FAIL"):
        speed.measure(*speed.CASES[0], torch.device("cpu"), lambda *step: None)


def table(training: float, inference: float, runs_as: dict[str, int], patched_bytes: int) -> str:
    """The table of a model whose patched phases take those multiples of the unpatched time."""
    times = [1.0, 1.1, 0.9, 1.0, 1.0, 1.0]
    phases = [
        summarise("training", times, [t * training for t in times], {"separate": 9}),
        summarise("inference", times, [t * inference for t in times], runs_as),
    ]
    measured = speed.Measured("R", "fusedres:r", Comparison(tuple(phases), None), 2**21, patched_bytes)
    return speed.text(speed.lines([measured]), torch.device("cpu"))


def test_every_line_has_its_ratio():
    shown = table(0.5, 0.8, {"separate": 4, "unfused": 5}, 2**20).splitlines()
    assert speed.machine(torch.device("cpu")) in shown[0]
    assert [line.split()[-6:] for line in shown[2:4]] == [
        ["2.00x", "[2.00", "2.00]", "9", "of", "9"],
        ["1.25x", "[1.25", "1.25]", "4", "of", "9"],
    ]
    assert "2 MiB" in shown[4] and "1 MiB" in shown[4] and shown[4].endswith("2.00x                counted")
    assert shown[-2:] == [
        "  no line is below 1.0x",
        "  whatever ran fused was held against the unpatched model first, with 4 images, in float64 too",
    ]


def test_lines_below_one_are_named():
    said = table(0.5, 2.0, {"separate": 9}, 2**22)
    assert "below 1.0x: R, inference, 0.50x [0.50 0.50]: slower: leave it unpatched there" in said
    assert "below 1.0x: R, kept for backward, 0.50x counted: the patched model keeps more" in said
    assert "below 1.0x: R, training" not in said and "no line is below" not in said
    said = table(0.5, 1.02, {"unfused": 9}, 2**20)
    assert "below 1.0x: R, inference, 0.98x" in said and "no block ran fused there" in said
    assert "`fusedres explain fusedres:r --batch 16`" in said


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith(("fusedres.cli.demo", "sklearn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output == (
        "fusedres demo needs sklearn, which is not installed: pip install 'fusedres[demo]'\n"
    )


def test_the_images_are_split_without_overlap():
    images = data.load()
    assert len(images.train_labels) + len(images.test_labels) == 1797
    assert images.train_images.shape[1:] == (1, 16, 16)
    shares = images.test_labels.bincount() / images.train_labels.bincount()
    assert shares.max() < 1.1 * shares.min()


@pytest.mark.no_cover
@pytest.mark.parametrize(("depth", "recipe"), [(14, "separate"), (20, "gram")])
def test_float64_steps_agree_in_every_loss(depth, recipe):
    small = data.Digits(*(part[:320] for part in data.load()))
    assert digits.float64_distance(depth, recipe, small) <= 1e-9


def test_fused_blocks_are_counted_by_their_autograd_node():
    images = torch.randn(4, 1, 8, 8)
    fused = fusedres.patch(cifar_resnet(20, in_channels=1), recipe="separate")
    assert training.fused_blocks(fused, images) == 10
    fusedres.patch(fused, recipe="unfused")
    assert training.fused_blocks(fused, images) == 0
