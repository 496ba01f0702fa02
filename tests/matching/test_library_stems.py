"""Stems of other libraries' models: fused where the method or the module is exactly a known one, else left alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_same_float64
from block_forms import one_step, ran_as, randomize
from frozen_norms import FrozenNorm
from library_models import DIFFERENT_STEMS, Inherits, TimmResNet, TorchvisionResNet
from repository_blocks import NormedConv
from torch import Tensor, nn

import fusedres


class FunctionalStem(nn.Module):
    """detectron2's: norm inside the convolution, ReLU and pooling as functions."""

    def __init__(self, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = NormedConv(3, 16, 7, 2, 3, bias=False, norm=norm(16))

    def forward(self, x):
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class ModuleStem(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), activation
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.act(self.norm(self.conv(x))))


def operations(y: Tensor) -> set[str]:
    """Names of the autograd functions that made y."""
    seen, stack = set(), [y.grad_fn]
    while stack:
        fn = stack.pop()
        if fn is not None and fn not in seen:
            seen.add(fn)
            stack.extend(f for f, _ in fn.next_functions)
    return {type(fn).__name__ for fn in seen}


def image(size: int = 33) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64)


STEMS = [TorchvisionResNet, TimmResNet, Inherits, FunctionalStem, lambda: FunctionalStem(FrozenNorm)]


@pytest.mark.parametrize("build", STEMS, ids=["torchvision", "timm", "subclass", "detectron2", "frozen"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_the_stem_is_fused_and_equal(build, training):
    torch.manual_seed(0)
    plain = randomize(build()).double().train(training)
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate", strict=True)
    x = image()
    y = fused(x)
    assert "ResidualBlockBackward" in operations(y) and "MaxPool2DWithIndicesBackward0" not in operations(y)
    assert ran_as(fused, "separate")
    fused.load_state_dict(plain.state_dict())
    fused.zero_grad()
    expected, actual = one_step(plain, x, torch.ones_like(y)), one_step(fused, x, torch.ones_like(y))
    assert_same_float64(actual.y, expected.y, "y")
    assert_same_float64(actual.dx, expected.dx, "dx")
    for name, gradient in expected.gradients.items():
        assert_same_float64(actual.gradients[name], gradient, name)
    for name, buffer in expected.buffers.items():
        assert_same_float64(actual.buffers[name].double(), buffer.double(), name)
    assert type(fusedres.unpatch(fused)) is type(plain)


def test_checkpointing_after_the_stem_still_works():
    torch.manual_seed(0)
    plain = randomize(TimmResNet()).double()
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate", strict=True)
    plain.grad_checkpointing = fused.grad_checkpointing = True
    x = image()
    expected, actual = one_step(plain, x, torch.ones(2, 5)), one_step(fused, x, torch.ones(2, 5))
    assert ran_as(fused, "separate")
    assert_same_float64(actual.dx, expected.dx, "dx")
    for name, buffer in expected.buffers.items():
        assert_same_float64(actual.buffers[name].double(), buffer.double(), name)


@pytest.mark.parametrize("build", DIFFERENT_STEMS)
def test_another_method_is_left_alone(build):
    plain = build().double()
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    rows = {row.name: row for row in fusedres.report(fused).blocks}
    assert rows["stem"].code == "stem_differs" and not rows["stem"].matched
    assert rows["layer1.0"].matched
    x = image()
    assert_same_float64(fused(x), plain(x))


def test_a_class_of_another_name_is_not_guessed_at():
    renamed = type("ResNet", (nn.Module,), dict(vars(TorchvisionResNet)) | {"__module__": "elsewhere"})
    model = TorchvisionResNet()
    model.__class__ = renamed
    names = [row.name for row in fusedres.report(fusedres.patch(model, recipe="separate")).blocks]
    assert names == ["layer1.0"]


def test_a_method_replaced_at_run_time_is_not_the_known_one(monkeypatch):
    def other(self, x):
        return self.fc(self.layer1(self.maxpool(self.relu(self.conv1(x)))).mean((2, 3)))

    monkeypatch.setattr(TorchvisionResNet, "_forward_impl", other)
    rows = fusedres.report(fusedres.patch(TorchvisionResNet())).blocks
    assert rows[0].name == "stem" and rows[0].code == "stem_differs"


@pytest.mark.parametrize(
    ("name", "part", "code"),
    [
        ("conv1", nn.Sequential(nn.Conv2d(3, 32, 3)), "unsupported_module:Sequential"),
        ("bn1", nn.GroupNorm(4, 32), "unsupported_module:GroupNorm"),
        ("relu", nn.SiLU(), "activation_not_relu"),
        ("maxpool", nn.Identity(), "unsupported_module:Identity"),
    ],
)
def test_other_parts_are_left_alone(name, part, code):
    model = TorchvisionResNet()
    setattr(model, name, part)
    rows = {row.name: row.code for row in fusedres.report(fusedres.patch(model)).blocks}
    assert rows["stem"] == code


def test_another_activation_in_a_stem_module_has_its_code():
    model = fusedres.patch(nn.Sequential(ModuleStem(nn.ReLU()), ModuleStem(nn.SiLU())), recipe="separate")
    assert [row.code for row in fusedres.report(model).blocks] == [None, "activation_not_relu:Silu"]


@pytest.mark.parametrize(
    ("attribute", "value"), [("kernel_size", 17), ("dilation", 2), ("ceil_mode", True), ("stride", (1, 2))]
)
def test_a_pooling_rewritten_later_runs_unfused(attribute, value):
    plain = ModuleStem(nn.ReLU()).double()
    fused = fusedres.patch(nn.Sequential(copy.deepcopy(plain)), recipe="separate")
    x = image()
    fused(x)
    assert ran_as(fused, "separate")
    for pool in (plain.pool, fused[0].pool):
        setattr(pool, attribute, value)
    assert torch.equal(fused(x), plain(x))
    assert fusedres.report(fused).blocks[0].code.partition(":")[0] == "geometry_changed"


def test_report_leaves_the_outcome_of_the_last_call_alone():
    """Finding blocks runs what surrounds them; that is no call of theirs."""
    around = nn.Sequential(ModuleStem(nn.ReLU()))
    model = fusedres.patch(nn.ModuleDict({"stem": around}), recipe="separate")
    around(image().float())
    first = fusedres.report(model)
    assert first == fusedres.report(model) and first.blocks[0].runs_as == "separate"
