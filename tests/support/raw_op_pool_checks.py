"""Checks of the stem's raw ops and of the library's convolutions' gradients, for any backend; see `raw_op_checks`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from raw_op_cases import Case, Inputs, bits
from raw_op_harness import assert_accurate, assert_input_gradient, assert_sums, eager_affine, pack, row, run
from torch import Tensor

from fusedres.ops.contract import (
    BnAddReluForward,
    BnReluMaxpoolBackwardInput,
    BnReluMaxpoolBackwardReduce,
    BnReluMaxpoolForward,
    ConvBackwardInput,
    ConvBackwardWeight,
)

NO_GRADIENT = 255


def pool_of(case: Case) -> tuple[int, int, int]:
    """kernel_size, stride, padding from a form such as "3x3s2p1"."""
    kernel, rest = case.form.removesuffix("_frozen").split("x")
    return int(kernel), int(rest[2]), int(rest[4])


def pooled(a: Tensor, kernel_size: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """torch's max-pooling and, from its flat indices, the place in the window, 255 where y <= 0."""
    y, flat = F.max_pool2d(a, kernel_size, stride, padding, return_indices=True)
    rows = torch.arange(y.shape[2], device=a.device)[:, None] * stride - padding
    columns = torch.arange(y.shape[3], device=a.device) * stride - padding
    place = (flat // a.shape[3] - rows) * kernel_size + flat % a.shape[3] - columns
    return y, torch.where(y <= 0, NO_GRADIENT, place).to(torch.uint8)


def check_bn_relu_maxpool_forward(ops: Any, case: Case) -> None:
    inputs, pool = Inputs(case), pool_of(case)
    c = inputs.c()
    v = inputs.vectors(c)
    y, indices = run(ops, inputs, BnReluMaxpoolForward(c, v.scale, v.shift, *pool))
    eager = eager_affine(c, v.scale, v.shift).relu()
    exact = (c.double() * row(v.scale) + row(v.shift)).relu()
    assert y.dtype == case.dtype and indices.dtype == torch.uint8
    if c.numel() == 0:
        assert y.numel() == indices.numel() == 0
        return
    assert_accurate(y, F.max_pool2d(eager, *pool), F.max_pool2d(exact, *pool), "y")
    # the window's order and ties: exactly torch's pooling of the backend's own activation
    own_y, own_indices = pooled(ops(BnAddReluForward(c, v.scale, v.shift))[0], *pool)
    same = (y == own_y) | (y.isnan() & own_y.isnan())  # the bits of a NaN are free
    assert same.all(), "y is not the maximum of the activation"
    assert torch.equal(indices, own_indices), "indices are not torch's, or not 255 exactly where y <= 0"
    alone, none = run(ops, inputs, BnReluMaxpoolForward(c, v.scale, v.shift, *pool, False))
    assert none is None and torch.equal(bits(alone.contiguous()), bits(y.contiguous()))


def pool_backward_parts(inputs: Inputs) -> tuple[Any, ...]:
    """dy, indices, c, vectors, and dz as eager makes it and exactly, by autograd through max_pool2d."""
    c = inputs.c()
    v = inputs.vectors(c, frozen="frozen" in inputs.case.form)
    a = eager_affine(c, v.scale, v.shift).relu()
    pool = pool_of(inputs.case)
    if c.numel() == 0:
        n, channels = c.shape[:2]
        height, width = ((size + 2 * pool[2] - pool[0]) // pool[1] + 1 for size in c.shape[2:])
        y = c.new_empty((n, channels, height, width))
        return inputs.dy(y.shape), y.to(torch.uint8), c, v, c, c.double()
    y, indices = pooled(a, *pool)
    dy = inputs.dy(y.shape)
    passing = torch.where(indices == NO_GRADIENT, 0, dy)
    both = []
    for dtype in (inputs.case.dtype, torch.float64):
        leaf = a.detach().to(dtype).requires_grad_()
        (dz,) = torch.autograd.grad(F.max_pool2d(leaf, *pool), leaf, passing.to(dtype))
        both.append(dz)
    return dy, indices, c, v, *both


def check_bn_relu_maxpool_backward_reduce(ops: Any, case: Case) -> None:
    inputs = Inputs(case)
    dy, indices, c, v, dz, dz64 = pool_backward_parts(inputs)
    found = run(ops, inputs, BnReluMaxpoolBackwardReduce(dy, indices, c, v, *pool_of(case)))
    assert_sums(found, dz, dz64, c, v.mean)


def check_bn_relu_maxpool_backward_input(ops: Any, case: Case) -> None:
    inputs = Inputs(case)
    dy, indices, c, v, dz, dz64 = pool_backward_parts(inputs)
    grads = inputs.grads(v, c.numel() // c.shape[1], frozen="frozen" in case.form)
    dc = run(ops, inputs, BnReluMaxpoolBackwardInput(dy, indices, c, grads, *pool_of(case)))
    assert_input_gradient(dc, dz, dz64, c, grads, "dc")


def with_nan_of_the_library(exact: torch.Tensor, eager: torch.Tensor) -> torch.Tensor:
    """exact, with eager's NaN and Inf: a convolution has those of the library.

    oneDNN's bfloat16 kernels for AVX-512 take channels in pairs, and the partner of an odd last one, the first of the
    next position, times 0.
    """
    return torch.where(eager.isfinite(), exact, eager.to(exact.dtype))


# form: kernel, stride, padding, dilation
WINDOWS = {
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1s2": ((1, 1), (2, 2), (0, 0), (1, 1)),
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3s2": ((3, 3), (2, 2), (1, 1), (1, 1)),
    "5x3": ((5, 3), (1, 2), (4, 2), (2, 2)),
    "groups": ((3, 3), (1, 1), (1, 1), (1, 1)),
}


def check_conv_backward_weight(ops: Any, case: Case) -> None:
    if case.dtype == torch.bfloat16 and case.shape[3] == 1 and case.form == "3x3s2":
        # oneDNN's kernel for AVX-512 leaves parts of this gradient unwritten, in eager PyTorch too
        case = replace(case, shape=(*case.shape[:3], 2))
    inputs = Inputs(case)
    x = inputs.c()
    channels = case.shape[1]
    groups = next(g for g in (4, 3, 1) if channels % g == 0) if case.form == "groups" else 1
    window = WINDOWS[case.form]
    weight = torch.empty(2 * groups + channels // groups * groups, channels // groups, *window[0])
    shape = F.conv2d(x.to("meta", torch.float32), weight.to("meta"), None, *window[1:], groups).shape
    inputs.case = replace(
        case, special=False
    )  # whether 0*NaN beside the image counts, torch's kernels disagree
    dy = inputs.dy(tuple(shape))
    dw = run(ops, inputs, ConvBackwardWeight(dy, x, *window, groups))

    def plain(dtype: torch.dtype) -> torch.Tensor:
        args = dy.to(dtype), x.to(dtype), weight.to(case.device, dtype), None, *window[1:]
        return torch.ops.aten.convolution_backward(*args, False, (0, 0), groups, [False, True, False])[1]

    assert dw.dtype == inputs.acc and dw.shape == weight.shape
    eager, exact = plain(case.dtype).to(inputs.acc), plain(torch.float64)
    clean = dw.isfinite()  # a kernel may leave out what the library's has of its own
    assert_accurate(dw, eager, torch.where(clean, exact, with_nan_of_the_library(exact, eager)), "dW")


def check_conv_backward_input(ops: Any, case: Case) -> None:
    inputs = Inputs(case)
    x, channels = inputs.c(), case.shape[1]
    name, *parts = case.form.split("_")
    groups = next(g for g in (4, 3, 1) if channels % g == 0) if name == "groups" else 1
    kernel, *window = WINDOWS[name]
    weight = inputs.random((2 * groups + channels // groups * groups, channels // groups, *kernel))
    weight = inputs.place(weight, weight.stride(), case.dtype)
    shape = F.conv2d(
        x.to("meta", torch.float32), weight.to("meta", torch.float32), None, *window, groups
    ).shape
    dy = inputs.dy(tuple(shape))
    shortcut = inputs.dy() if parts else None
    keep = (inputs.random(case.shape) > 0).to(case.device) if "mask" in parts else None
    mask = None if keep is None else pack(keep, inputs)
    dx = run(ops, inputs, ConvBackwardInput(dy, x, weight, *window, groups, shortcut, mask))

    def plain(dtype: torch.dtype) -> torch.Tensor:
        args = dy.to(dtype), x.to(dtype), weight.to(dtype), None, *window, False, (0, 0), groups
        found = torch.ops.aten.convolution_backward(*args, [True, False, False])[0]
        if shortcut is None:
            return found
        return found + (shortcut if keep is None else torch.where(keep, shortcut, 0)).to(dtype)

    assert dx.dtype == case.dtype and dx.shape == x.shape
    eager = plain(case.dtype)
    assert_accurate(dx, eager, with_nan_of_the_library(plain(torch.float64), eager), "dx")
