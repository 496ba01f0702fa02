"""NCHW and channels_last: what patch says of a model's layout, and what it converts."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from accuracy import assert_same_float64

import fusedres
from fusedres.blocks import choice
from fusedres.blocks.unfused import Measured
from fusedres.models import BasicBlock, ResNet, resnet18
from fusedres.patching.reasons import REASONS

TABLE = {("cpu", "native", torch.float32, True): (Measured("separate", 1, 64, ""),)}


def messages(model, monkeypatch, table=TABLE, **options):
    """What patch warns of, the second time too."""
    monkeypatch.setattr(choice, "TABLE", table)
    monkeypatch.setattr("fusedres.patching.api.TABLE", table)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fusedres.patch(model, **options)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught if "NCHW" in str(w.message)]


def test_patch_says_that_a_model_is_nchw_and_what_mends_it(monkeypatch):
    (said,) = messages(BasicBlock(64, 64), monkeypatch)
    assert "fusedres.patch(model, channels_last=True)" in said and "\n" not in said


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda: BasicBlock(64, 64).to(memory_format=torch.channels_last), {}),
        (lambda: BasicBlock(64, 64), {"channels_last": True}),
        (lambda: BasicBlock(64, 64), {"recipe": "separate"}),
        (lambda: BasicBlock(64, 64), {"table": {}}),
        (lambda: BasicBlock(32, 32), {}),
        (lambda: BasicBlock(64, 64).to("meta"), {}),
    ],
    ids=["channels_last", "converted", "asked", "no-table", "narrow", "device"],
)
def test_patch_says_nothing_where_the_layout_is_not_the_cause(build, options, monkeypatch):
    assert messages(build(), monkeypatch, **options) == []


def test_channels_last_converts_the_parameters_and_nothing_else():
    plain = resnet18(num_classes=4)
    fused = copy.deepcopy(plain)
    parameters = list(fused.parameters())
    fusedres.patch(fused, channels_last=True)
    assert all(p is q for p, q in zip(parameters, fused.parameters(), strict=True))
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in parameters if p.dim() == 4)
    for (name, p), q in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("options", [{"dry_run": True}, {"include": "nothing"}], ids=["dry-run", "error"])
def test_channels_last_converts_nothing_where_nothing_is_patched(options):
    model = resnet18(num_classes=4)
    try:
        fusedres.patch(model, channels_last=True, **options)
    except ValueError:
        assert "include" in options
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_stem_converts_nchw_images(training):
    """What comes out has the layout and the values that it has unpatched."""
    torch.manual_seed(0)
    plain = ResNet(BasicBlock, (1, 1, 1, 1), 4).double().to(memory_format=torch.channels_last).train(training)
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected, y = plain.stem(x), fused.stem(x)
    assert y.stride() == expected.stride()
    assert_same_float64(y, expected, "y")
    fused.zero_grad(), plain.zero_grad()
    for model in (plain, fused):
        model(x).square().sum().backward()
    assert {row.runs_as for row in fusedres.report(fused).matched} == {"separate"}
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert_same_float64(q.grad, p.grad, name)


def test_images_that_want_a_gradient_are_left_to_torch():
    model = resnet18(num_classes=4).to(memory_format=torch.channels_last)
    fusedres.patch(model, recipe="separate")
    model.stem(torch.randn(2, 3, 32, 32, requires_grad=True))
    assert fusedres.report(model).blocks[0].code == "layout_mixed:conv1.weight, channels_last"


def test_the_advice_of_layout_nchw_is_followed():
    """To the letter: the model's line, and the inputs'."""
    advice = REASONS["layout_nchw"]
    assert "model.to(memory_format=torch.channels_last), and inputs too" in advice
    model = fusedres.patch(BasicBlock(64, 64), recipe="separate")
    model.to(memory_format=torch.channels_last)
    model(torch.randn(2, 64, 6, 6).to(memory_format=torch.channels_last))
    assert fusedres.report(model).blocks[0].code is None
