"""Whole residual blocks on the Triton backend under Triton's interpreter, in fp16 and fp32.

Run like `triton_interpreted_ops.py`.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from block_accuracy import PARAMETERS, assert_block_as_accurate_as_eager, by_recipe, inputs, read
from block_forms import FORMS, BlockForm, bottleneck, each_bn, frozen, one_step, patched, ran_as, with_bias
from torch import nn
from triton_harness import checked_margins, traced

from fusedres.blocks import RECIPES
from fusedres.ops import triton
from fusedres.ops.dispatch import Dispatcher, dispatcher
from fusedres.ops.reference import REFERENCE

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
DRAWS = 1  # of ours: the interpreter is slow
BY_NAME = {form.name: form for form in FORMS}
TRAPS = (
    "bottleneck",
    "bottleneck-projection",  # stride 2 in the 3x3 and in the shortcut
    "bottleneck-stride-in-1x1",
    "bottleneck-zero-gamma",
    "bottleneck-bias-before-30",
    "bottleneck-bias-before-1000",
    "bottleneck-dy-mean-1",
    "bottleneck-dy-mean-1-many-rows",
    "bottleneck-frozen",
    "bottleneck-frozen-dy-mean-1",
)
SEPARATE = ("basic-projection", "bottleneck", "bottleneck-bias-before-1000")
CASES = [
    *((recipe, name) for recipe, names in (("gram", TRAPS), ("separate", SEPARATE)) for name in names),
]
# on a GPU gram leaves products of float32 to the library: its kernels have that dtype in `triton_interpreted_ops.py`
IN_DTYPES = [
    (*case, dtype)
    for case in CASES
    for dtype in DTYPES
    if dtype == "fp16" or case[0] != "gram" or case[1] == "bottleneck"
]

BN = {"bn_scale_shift", "bn_stats", "bn_add_relu_forward", "bn_backward_coefficients"}
BN |= {"bn_add_relu_backward_reduce", "bn_add_relu_backward_input"}
LIBRARY = {"conv_backward_input", "conv_backward_weight"}
# what each recipe calls on an identity bottleneck in training
SERVED = {
    "separate": BN | {"conv1x1_forward"},
    "gram": BN
    | {"conv1x1_forward", "gram", "conv1x1_backward_weight", "conv1x1_gram_backward_input"}
    | {"conv1x1_backward_input", "gram_output_stats", "gram_backward_coefficients"},
}


def traced_ops() -> tuple[Dispatcher, list[tuple[str, str]]]:
    """Triton, then the reference, and the list of (op, backend) of every call served from now on."""
    trace: list[tuple[str, str]] = []
    return Dispatcher((traced(triton.backend(), trace), traced(REFERENCE, trace))), trace


@pytest.mark.parametrize(("recipe", "name", "dtype"), IN_DTYPES, ids=["-".join(case) for case in IN_DTYPES])
def test_block_is_as_accurate_as_eager(recipe, name, dtype):
    block, x, dy = inputs(BY_NAME[name], DTYPES[dtype])
    config, units = read(block, x)
    ops, trace = traced_ops()
    with checked_margins():
        assert_block_as_accurate_as_eager(partial(by_recipe, ops, recipe), config, x, units, dy, DRAWS)
    assert {backend for op, backend in trace if op not in LIBRARY} == {"triton"}, trace


def strided_parameters(block):
    for bn in each_bn(block):
        bn.weight, bn.bias = (nn.Parameter(strided(p.detach())) for p in (bn.weight, bn.bias))
    return block


def expanded_weights(block):
    for bn in each_bn(block):
        bn.weight = nn.Parameter(torch.full((1,), 1.5).expand_as(bn.weight))
    return block


def strided_statistics(block):
    for bn in each_bn(block):
        bn.running_mean, bn.running_var = strided(bn.running_mean), strided(bn.running_var)
    return frozen(block)


def strided_bias(block):
    with_bias(block)
    for conv in [m for m in block.modules() if isinstance(m, nn.Conv2d)]:
        conv.bias = nn.Parameter(strided(conv.bias.detach()))
    return frozen(block)  # batch statistics would take the bias out again


def strided(vector):
    """The same values, two elements apart."""
    return torch.stack((vector, torch.full_like(vector, 9.0)), 1)[:, 0]


@pytest.mark.parametrize("recipe", SERVED)
@pytest.mark.parametrize(
    "change",
    [strided_parameters, expanded_weights, strided_statistics, strided_bias],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("save", [True, False], ids=["training", "inference"])
def test_vectors_that_are_not_dense(change, recipe, save):
    block, x, _ = inputs(BlockForm(change.__name__, bottleneck(change), 32), torch.float32)
    config, units = read(block, x)
    outputs = [
        RECIPES[recipe].forward(ops, config, x, None, units, save).y
        for ops in (dispatcher("triton"), dispatcher("reference"))
    ]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("recipe", SERVED)
def test_a_patched_block_runs_the_same_kernels(recipe):
    """Each op is served by Triton; through patch and autograd it is bitwise what the recipe gives by itself."""
    block, x, dy = inputs(BY_NAME["bottleneck"], torch.float16)
    config, units = read(block, x)
    ops, trace = traced_ops()
    expected = by_recipe(ops, recipe, config, x, units, dy)
    assert {op for op, backend in trace if backend == "triton"} == SERVED[recipe]
    assert {op for op, backend in trace if backend != "triton"} <= LIBRARY
    fused = patched(block, recipe, backend="triton")
    step = one_step(fused, x, dy)
    assert ran_as(fused, recipe)
    assert torch.equal(step.y, expected.y) and torch.equal(step.dx, expected.gradients[0])
    names = {id(p): name for name, p in block.named_parameters()}
    flat = [t for unit in units for t in unit[:PARAMETERS]]
    for t, gradient in zip(flat, expected.gradients[1:], strict=True):
        assert t is None or torch.equal(step.gradients[names[id(t)]], gradient), names[id(t)]
