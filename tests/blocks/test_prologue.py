"""Recipe `prologue`: which activations a block stores, what its convolutions are given, and that it is right."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, assert_same_float64
from block_accuracy import assert_block_as_accurate_as_eager, by_autograd, by_recipe, needs_of, read
from block_forms import FORMS, one_step, patched, projection, ran_as, randomize, tensors_for
from torch import nn
from triton_harness import traced

import fusedres
from fusedres.blocks import RECIPES, prologue_form
from fusedres.models import BasicBlock, Bottleneck
from fusedres.nn.residual_block import residual_block
from fusedres.ops.backend import Backend
from fusedres.ops.contract import (
    BnAddReluForward,
    Conv1x1Forward,
    Conv3x3BackwardInput,
    Conv3x3Forward,
    ConvBackwardWeight,
)
from fusedres.ops.dispatch import Dispatcher, dispatcher
from fusedres.ops.native import library
from fusedres.ops.reference import REFERENCE

BY_NAME = {form.name: form for form in FORMS}
BASIC = ("basic", "basic-projection", "basic-zero-gamma")
OTHERS = ("bottleneck", "bottleneck-projection", "bottleneck-conv-bias", "bottleneck-mixed-modes")
native = pytest.mark.skipif(not library.is_usable(), reason="no native library here")


def fusing(seen: list, without: tuple[type, ...] = ()) -> Dispatcher:
    """The reference's ops as those of a backend that fuses, but for some of them; what it runs."""

    def ran(op):
        seen.append(op)
        return REFERENCE(op)

    kinds = [kind for kind in REFERENCE.functions if kind not in without]
    return Dispatcher((Backend("fusing", dict.fromkeys(kinds, ran)), REFERENCE))


def in_float64(form):
    """config, units, x and dy of a block."""
    block = form.build().double()
    x, dy = tensors_for(form, block, torch.float64)
    return *read(block, x), x, dy


@pytest.mark.parametrize(
    "without", [(), (ConvBackwardWeight,), (Conv3x3BackwardInput,)], ids=["all", "weight", "input"]
)
@pytest.mark.parametrize("name", BASIC + OTHERS)
def test_it_equals_autograd_where_everything_fuses_and_where_some_does(name, without):
    config, units, x, dy = in_float64(BY_NAME[name])
    found = by_recipe(fusing([], without), "prologue", config, x, units, dy)
    exact, _ = by_autograd(config, x, units, dy, found.masks)
    assert_same_float64(found.y, exact.y, "y")
    scale = max(g.norm().item() for g in exact.gradients if g is not None)
    for i, (actual, expected) in enumerate(zip(found.gradients, exact.gradients, strict=True)):
        assert (actual is None) == (expected is None), i
        if expected is None:
            continue
        if expected.norm() <= 1e-10 * scale:  # a convolution's bias under batch statistics
            assert actual.norm() <= 1e-10 * scale, i
        else:
            assert_same_float64(actual, expected, str(i))


@pytest.mark.parametrize("name", BASIC)
def test_no_inner_activation_is_stored(name):
    seen = []
    config, units, x, dy = in_float64(BY_NAME[name])
    out = RECIPES["prologue"].forward(fusing(seen), config, x, None, units, True)
    assert out.saved is not None and out.saved.activations == (None,)
    made = [op for op in seen if isinstance(op, BnAddReluForward)]
    assert len(made) == 1 and made[0].save_mask  # the join
    first, second = [op for op in seen if isinstance(op, Conv3x3Forward)][:2]
    vectors = out.saved.vectors[0]
    assert first.in_scale is None and second.in_scale is vectors.scale and second.in_shift is vectors.shift
    seen.clear()
    RECIPES["prologue"].backward(fusing(seen), config, x, units, out.saved, dy, needs_of(units))
    assert not any(isinstance(op, BnAddReluForward) for op in seen)
    weights = [op for op in seen if isinstance(op, ConvBackwardWeight)]
    assert [op.in_scale is vectors.scale for op in weights[:2]] == [True, False]
    (gradient,) = [op for op in seen if isinstance(op, Conv3x3BackwardInput)]
    is_identity = name != "basic-projection"
    assert gradient.c is out.saved.convs[0] and (gradient.shortcut_mask is not None) == is_identity


def test_an_activation_without_a_weight_gradient_that_makes_it_is_made_again():
    seen = []
    config, units, x, dy = in_float64(BY_NAME["basic"])
    by_recipe(fusing(seen, (ConvBackwardWeight,)), "prologue", config, x, units, dy)
    first, second, _ = [
        op for op in seen if isinstance(op, BnAddReluForward)
    ]  # the last: for the test's masks
    assert first.save_mask and not second.save_mask and second.residual is None


def test_a_bottleneck_has_both_of_its_activations_in_prologues():
    seen = []
    config, units, x, dy = in_float64(BY_NAME["bottleneck"])
    by_recipe(fusing(seen), "prologue", config, x, units, dy)
    forwards = [op for op in seen if isinstance(op, (Conv1x1Forward, Conv3x3Forward))]
    assert [op.in_scale is not None for op in forwards] == [False, True, True]


def test_what_no_backend_fuses_is_stored_as_separate_stores_it():
    config, units, x, dy = in_float64(BY_NAME["basic"])
    ops = Dispatcher((REFERENCE,))
    found, separate = (by_recipe(ops, recipe, config, x, units, dy) for recipe in ("prologue", "separate"))
    assert torch.equal(found.y, separate.y)
    assert all(
        torch.equal(a, b) for a, b in zip(found.gradients, separate.gradients, strict=True) if a is not None
    )


CHANNELS = 64  # Winograd's convolutions are for so many


def wide() -> nn.Module:
    return randomize(BasicBlock(CHANNELS, CHANNELS))


def wide_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(4, CHANNELS, 12, 12, generator=generator) for _ in range(2))
    return x.contiguous(memory_format=torch.channels_last), dy.contiguous(memory_format=torch.channels_last)


@native
def test_on_a_cpu_winograds_convolutions_make_activations():
    """float32, by the rule of accuracy, and with every op of Winograd's the native backend's."""
    trace = []
    config, units = read(wide(), wide_inputs()[0])
    backends = [b for b in dispatcher("auto").backends if b.name == library.NAME]
    ops = Dispatcher((traced(backends[0], trace), traced(REFERENCE, trace)))
    run = partial(by_recipe, ops, "prologue")
    assert_block_as_accurate_as_eager(run, config, wide_inputs()[0], units, wide_inputs()[1])
    kinds = "conv3x3_forward", "conv_backward_weight", "conv_backward_input"
    assert {op for op, backend in trace if backend == library.NAME} >= set(kinds)
    assert {op for op, backend in trace if backend != library.NAME}.isdisjoint(kinds)


@native
def test_a_patched_block_keeps_one_activation_less():
    """And gives what `separate` gives, bitwise: each convolution that reads a makes the same a."""
    x, dy = wide_inputs()
    steps, kept = {}, {}
    for recipe in ("separate", "prologue"):
        sizes: dict[int, int] = {}

        def pack(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        fused = patched(wide(), recipe)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            fused(x.clone().requires_grad_())
        kept[recipe] = sum(sizes.values())
        steps[recipe] = one_step(fused, x, dy)
        assert ran_as(fused, recipe)
    assert kept["separate"] - kept["prologue"] == x.numel() * x.element_size()
    found, expected = steps["prologue"], steps["separate"]
    assert torch.equal(found.y, expected.y) and torch.equal(found.dx, expected.dx)
    assert all(torch.equal(found.gradients[name], g) for name, g in expected.gradients.items())
    assert all(torch.equal(found.buffers[name], b) for name, b in expected.buffers.items())


@native
def test_not_finite_values_stand_where_they_do_in_eager():
    x, dy = wide_inputs()
    x[1, 3, 5, 5] = float("nan")
    eager = one_step(wide().eval(), x, dy)
    fused = one_step(patched(wide().eval(), "prologue"), x, dy)
    assert torch.equal(fused.y.isnan(), eager.y.isnan()) and fused.y.isnan().any()
    assert torch.equal(fused.dx.isnan(), eager.dx.isnan())


@native
def test_in_a_compiled_graph():
    x, dy = wide_inputs()
    eager = one_step(patched(wide(), "prologue"), x, dy)
    block = patched(wide(), "prologue")
    compiled = torch.compile(block, fullgraph=True)
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    y.backward(dy)
    assert torch.equal(y, eager.y) and torch.equal(leaf.grad, eager.dx)
    for name, p in block.named_parameters():
        assert torch.equal(p.grad, eager.gradients[name]), name


class WithoutInnerReLU(Bottleneck):
    """No ReLU between the last two convolutions."""

    def forward(self, x):
        a = self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x)))))
        return self.activation(self.bn3(self.conv3(a)) + x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_graph_keeps_what_no_convolution_can_make(dtype):
    """The activation without a ReLU; and makes the other again, whoever serves."""
    block = randomize(WithoutInnerReLU(4 * CHANNELS, CHANNELS)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4 * CHANNELS, 8, 8, generator=generator, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    dy = torch.randn(x.shape, generator=generator, dtype=dtype)
    eager = one_step(patched(copy.deepcopy(block), "prologue"), x, dy)
    fused = patched(block, "prologue")
    leaf = x.clone().requires_grad_()
    y = torch.compile(fused, fullgraph=True, backend="aot_eager")(leaf)
    y.backward(dy)
    assert torch.equal(y, eager.y) and torch.equal(leaf.grad, eager.dx)
    for name, p in fused.named_parameters():
        assert torch.equal(p.grad, eager.gradients[name]), name


@native
def test_in_inference_a_convolution_has_both_a_prologue_and_an_epilogue():
    """Behind one without an epilogue, as with a stride."""
    seen: list = []
    block = randomize(BasicBlock(CHANNELS, CHANNELS, 2, randomize(projection(CHANNELS, CHANNELS, 2)))).eval()
    x = torch.randn(2, CHANNELS, 16, 16).contiguous(memory_format=torch.channels_last)
    config, units = read(block, x)
    (kernels,) = [b for b in dispatcher("auto").backends if b.name == library.NAME]

    def ran(op):
        seen.append(op)
        return kernels(op)

    backend = Backend(library.NAME, dict.fromkeys(kernels.functions, ran), kernels.reasons)
    with torch.no_grad():
        y = RECIPES["prologue"].forward(Dispatcher((backend, REFERENCE)), config, x, None, units, False).y
        eager, exact = block(x), copy.deepcopy(block).double()(x.double())
    (convolution,) = [op for op in seen if isinstance(op, Conv3x3Forward)]
    assert convolution.in_scale is not None and convolution.scale is not None and convolution.relu
    assert_as_accurate_as_eager(y, eager, exact, "y")


@pytest.mark.parametrize(
    ("name", "is_basic"), [("basic", True), ("basic-projection", True), ("bottleneck", False)]
)
def test_which_blocks_have_it_on_trial(name, is_basic):
    config, units, _, _ = in_float64(BY_NAME[name])
    assert prologue_form.is_basic(config, units) is is_basic
    assert prologue_form.unsuitable(config, units) is None
    without_relu = config._replace(main=tuple(unit._replace(relu=False) for unit in config.main))
    assert not prologue_form.is_basic(without_relu, units)
    assert prologue_form.unsuitable(without_relu, units) == "no_plain_convolution"


def test_as_a_function():
    block = randomize(BasicBlock(16, 16)).double()
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    units = [
        fusedres.nn.ConvBN(block.conv1, block.bn1, True),
        fusedres.nn.ConvBN(block.conv2, block.bn2, True),
    ]
    y = residual_block(x, units, identity=True, recipe="prologue")
    assert_same_float64(y, copy.deepcopy(block)(x), "y")


def test_a_block_without_such_a_convolution_runs_separate():
    block = Bottleneck(32, 16)
    block.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
    block.conv3 = nn.Conv2d(16, 64, 1, groups=4, bias=False)
    block.bn3 = nn.BatchNorm2d(64)
    block.downsample = nn.Sequential(nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64))
    fused = patched(block, "prologue")
    fused(torch.randn(2, 32, 5, 5))
    (row,) = fusedres.report(fused).blocks
    assert row.runs_as == "separate" and row.code == "no_plain_convolution"
