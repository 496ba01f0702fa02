"""Blocks as libraries build them: matched, trained to the same weights as unpatched, and frozen norms exactly read."""

from __future__ import annotations

import copy

import frozen_norms
import pytest
import torch
from accuracy import assert_same_float64
from block_forms import each_bn, one_step, ran_as, randomize
from frozen_norms import CastingFrozenNorm, ConstantEpsFrozenNorm, FrozenNorm
from library_blocks import LIBRARY_BLOCKS
from repository_blocks import ClipBottleneck, MmcvBottleneck
from torch import nn
from torchvision_blocks import CIN, TorchvisionBasic
from training import assert_trained_alike

import fusedres


def block_of(norm) -> nn.Module:
    return randomize(TorchvisionBasic(norm=norm))


@pytest.mark.parametrize("name", LIBRARY_BLOCKS)
@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_three_sgd_steps_equal_unpatched(name, recipe):
    torch.manual_seed(0)
    plain = randomize(LIBRARY_BLOCKS[name]()).double()
    fused = fusedres.patch(copy.deepcopy(plain), recipe=recipe, strict=True)
    inputs = torch.randn(3, 2, CIN, 8, 8, dtype=torch.float64)
    assert_trained_alike(plain, fused, inputs, lambda y: y.square().mean())


def move_mean(norm: nn.Module) -> None:
    norm.running_mean.add_(1)


def replace_variance(norm: nn.Module) -> None:
    norm.running_var = norm.running_var + 2


def write_eps(norm: nn.Module) -> None:
    if hasattr(norm, "eps"):
        norm.eps = 0.5


@pytest.mark.parametrize("norm", [FrozenNorm, CastingFrozenNorm, ConstantEpsFrozenNorm])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("change", [move_mean, replace_variance, write_eps])
def test_a_frozen_norm_is_read_in_every_call(norm, training, change):
    torch.manual_seed(0)
    plain = block_of(norm).double().train(training)
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate", strict=True)
    x = torch.randn(2, CIN, 8, 8, dtype=torch.float64)
    before = fused(x)
    for found in (*each_bn(plain), *each_bn(fused)):
        change(found)
    expected, actual = one_step(plain, x, torch.ones_like(x)), one_step(fused, x, torch.ones_like(x))
    assert ran_as(fused, "separate")
    assert change is write_eps or not torch.equal(actual.y, before)
    assert_same_float64(actual.y, expected.y, "y")
    assert_same_float64(actual.dx, expected.dx, "dx")
    for name, gradient in expected.gradients.items():
        assert_same_float64(actual.gradients[name], gradient, name)
    for name, buffer in expected.buffers.items():
        assert torch.equal(actual.buffers[name], buffer), name


def test_a_frozen_norm_keeps_the_dtype_rules_of_arithmetic():
    plain = block_of(FrozenNorm)
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    x = torch.randn(2, CIN, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == plain(x).dtype == torch.float32
    assert fusedres.report(fused).matched[0].code.partition(":")[0] == "dtype"
    fused(x.float())
    assert ran_as(fused, "separate")


def test_constants_that_want_a_gradient_run_unfused():
    fused = fusedres.patch(block_of(FrozenNorm), recipe="separate")
    fused.bn1.running_var.requires_grad_()
    fused(torch.randn(2, CIN, 8, 8)).sum().backward()
    assert fused.bn1.running_var.grad is not None
    assert fusedres.report(fused).matched[0].code == "trainable_statistics:bn1.running_var"


def test_one_value_per_channel_is_enough_for_a_frozen_norm():
    fused = fusedres.patch(block_of(FrozenNorm), recipe="separate")
    fused(torch.randn(1, CIN, 1, 1))
    assert ran_as(fused, "separate")


def test_a_flag_of_a_container_inside_is_seen():
    fused = fusedres.patch(MmcvBottleneck(), recipe="separate", strict=True)
    plain = fusedres.unpatch(copy.deepcopy(fused))
    for model in (plain, fused):
        model.conv2.order = ("conv", "act", "norm")
    x = torch.randn(2, CIN, 6, 6)
    assert torch.equal(fused(x), plain(x))
    assert fusedres.report(fused).matched[0].code == "attribute_changed:conv2.order"


def test_a_block_that_pools_between_its_convolutions_is_left_alone():
    model = fusedres.patch(nn.Sequential(ClipBottleneck(), ClipBottleneck(stride=2)), dry_run=True)
    assert [row.code for row in fusedres.report(model).blocks] == [None, "unsupported_op:AvgPool2D"]


@pytest.mark.parametrize("look_alike", frozen_norms.LOOK_ALIKES)
def test_a_norm_that_only_looks_frozen_is_left_alone(look_alike):
    model = nn.Sequential(TorchvisionBasic(), TorchvisionBasic(norm=look_alike))
    fusedres.patch(model)
    rows = {row.name: row for row in fusedres.report(model).blocks}
    assert rows["0"].matched
    assert not rows["1"].matched and rows["1"].code.partition(":")[0] == "unsupported_op"
