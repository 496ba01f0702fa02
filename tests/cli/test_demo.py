"""The demo at a small size: every run made, every forced recipe run, the picture and the numbers written."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import fusedres
from fusedres.cli.app import app
from fusedres.cli.demo import data, training
from fusedres.cli.demo import main as demo_main
from fusedres.models import cifar_resnet


@pytest.fixture
def few_images(monkeypatch):
    digits = data.load()
    few = data.Digits(digits[0][:128], digits[1][:128], digits[2][:64], digits[3][:64])
    monkeypatch.setattr(data, "load", lambda seed: few)
    monkeypatch.setattr(demo_main, "TIMING_ROUNDS", 1)
    monkeypatch.setattr(demo_main, "FLOAT64_STEPS", 2)


def test_demo_runs_end_to_end(tmp_path, few_images):
    result = CliRunner().invoke(
        app,
        ["demo", "--output", str(tmp_path), "--epochs", "1"],
        env={"COLUMNS": "200"},
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    outcomes = json.loads((tmp_path / "results.json").read_text())
    assert [o["recipe"] for o in outcomes] == ["separate", "gram"]
    for outcome in outcomes:
        assert outcome["matched"] == outcome["blocks"] == outcome["fused"] == 10
        assert [len(run["losses"]) for run in outcome["runs"]] == [2, 2, 2]
        assert outcome["float64_distance"] <= 1e-9


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
    digits = data.load()
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    assert digits.train_images.shape[1:] == (1, 16, 16)
    shares = digits.test_labels.bincount() / digits.train_labels.bincount()
    assert shares.max() < 1.1 * shares.min()


@pytest.mark.parametrize(("depth", "recipe"), [(14, "separate"), (20, "gram")])
def test_twenty_float64_steps_agree_in_every_loss(depth, recipe):
    digits = data.load()
    small = data.Digits(*(part[:320] for part in digits))
    assert demo_main.float64_distance(depth, recipe, small) <= 1e-9


def test_fused_blocks_are_counted_by_their_autograd_node():
    images = torch.randn(4, 1, 8, 8)
    fused = fusedres.patch(cifar_resnet(20, in_channels=1), recipe="separate")
    assert training.fused_blocks(fused, images) == 10
    fusedres.patch(fused, recipe="unfused")
    assert training.fused_blocks(fused, images) == 0
