"""The native backend's functions: from each record to the operator of `fusedres_native` that computes it."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor
from torch.autograd.graph import increment_version  # autograd does not see what a kernel of ours writes into

from fusedres.ops.backend import Backend, Function, Reason
from fusedres.ops.contract import (
    BatchNormGrads,
    BatchNormVectors,
    BnAddReluBackwardInput,
    BnAddReluBackwardReduce,
    BnAddReluForward,
    BnBackwardCoefficients,
    BnReluMaxpoolBackwardInput,
    BnReluMaxpoolBackwardReduce,
    BnReluMaxpoolForward,
    BnScaleShift,
    BnStats,
    Conv1x1BackwardInput,
    Conv1x1BackwardWeight,
    Conv1x1Forward,
    Conv1x1GramBackwardInput,
    Conv3x3BackwardInput,
    Conv3x3Forward,
    ConvBackwardInput,
    ConvBackwardWeight,
    ConvOutput,
    Gram,
    GramBackwardCoefficients,
    GramGrads,
    GramOutputStats,
    ReluBackward,
)
from fusedres.ops.native import grouped, kept_memory, library, products, winograd
from fusedres.ops.native.reasons import (
    REASONS,
    conv3x3_reason,
    input_gradient_reason,
    weight_gradient_reason,
)

LIBRARY = torch.ops.fusedres_native  # empty until the library is loaded


def bn_stats(op: BnStats) -> tuple[Tensor, Tensor]:
    return LIBRARY.bn_stats(op.c)


def bn_scale_shift(op: BnScaleShift) -> BatchNormVectors:
    mean, var, weight, bias, eps = op
    return BatchNormVectors(mean, var, *LIBRARY.bn_scale_shift(mean, var, weight, bias, eps))


def bn_add_relu_forward(op: BnAddReluForward) -> tuple[Tensor, Tensor | None]:
    c, scale, shift, residual, residual_scale, residual_shift, relu, save_mask, reuse_c = op
    args = c, scale, shift, residual, residual_scale, residual_shift, relu
    if reuse_c and not save_mask and c.is_cpu:
        LIBRARY.bn_add_relu_forward_(*args)
        increment_version(c)
        return c, None
    y = kept_memory.take_like(c)
    if y is not None:
        return y, LIBRARY.bn_add_relu_forward_out(*args, save_mask, y)
    return LIBRARY.bn_add_relu_forward(*args, save_mask)


def bn_add_relu_backward_reduce(op: BnAddReluBackwardReduce) -> tuple[Tensor, Tensor, Tensor | None]:
    dy, c, v, mask, relu, shortcut_c, shortcut_mean = op
    return LIBRARY.bn_add_relu_backward_reduce(
        dy, c, v.mean, v.scale, v.shift, mask, relu, shortcut_c, shortcut_mean
    )


def bn_backward_coefficients(op: BnBackwardCoefficients) -> BatchNormGrads:
    sum_dz, sum_dz_centered, v, rows, training = op
    dweight, B, K = LIBRARY.bn_backward_coefficients(
        sum_dz, sum_dz_centered, v.mean, v.invstd, v.scale, rows, training
    )
    return BatchNormGrads(dweight, sum_dz, v.scale, B, K)


def bn_add_relu_backward_input(op: BnAddReluBackwardInput) -> tuple[Tensor, Tensor | None]:
    dy, c, v, g, mask, relu, shortcut_c, shortcut_grads, save_dz, reuse_dy, reuse_c = op
    if reuse_dy and shortcut_c is None and not save_dz and dy.is_cpu:
        LIBRARY.bn_add_relu_backward_input_(dy, c, v.scale, v.shift, g.A, g.B, g.K, mask, relu)
        increment_version(dy)
        return dy, None
    shortcut = (None, None, None) if shortcut_grads is None else shortcut_grads[2:]
    args = dy, c, v.scale, v.shift, g.A, g.B, g.K, mask, relu, shortcut_c, *shortcut, save_dz
    if reuse_c and c.is_cpu:
        dz = LIBRARY.bn_add_relu_backward_input_of_c_(*args)
        increment_version(c if shortcut_c is None else (c, shortcut_c))
        return c, dz if shortcut_c is None else shortcut_c
    return LIBRARY.bn_add_relu_backward_input(*args)


def relu_backward(op: ReluBackward) -> Tensor:
    return LIBRARY.relu_backward(op.dy, op.mask)


def bn_relu_maxpool_forward(op: BnReluMaxpoolForward) -> tuple[Tensor, Tensor | None]:
    return LIBRARY.bn_relu_maxpool_forward(*op)


def bn_relu_maxpool_backward_reduce(op: BnReluMaxpoolBackwardReduce) -> tuple[Tensor, Tensor]:
    dy, indices, c, v, *window = op
    return LIBRARY.bn_relu_maxpool_backward_reduce(dy, indices, c, v.mean, *window)


def bn_relu_maxpool_backward_input(op: BnReluMaxpoolBackwardInput) -> Tensor:
    dy, indices, c, g, *window = op
    args = dy, indices, c, g.A, g.B, g.K, *window
    dc = kept_memory.take_like(c)
    if dc is None:
        return LIBRARY.bn_relu_maxpool_backward_input(*args)
    LIBRARY.bn_relu_maxpool_backward_input_out(*args, dc)
    return dc


def conv1x1_forward(op: Conv1x1Forward) -> ConvOutput:
    if not op.x.is_cpu:
        return ConvOutput(*LIBRARY.conv1x1_forward(*op))
    x, weight, _, stride, _, _, *fused, _, save_stats = op
    y = kept_memory.take_result(op)
    if y is None:
        y, _, _, _ = LIBRARY.conv1x1_forward(*op._replace(save_stats=False))
    else:
        LIBRARY.conv1x1_forward_out(x, weight, stride, *fused, y)
    mean, var = LIBRARY.bn_stats(y) if save_stats else (None, None)
    return ConvOutput(y, None, mean, var)


def conv3x3_forward(op: Conv3x3Forward, largest_tile: int = winograd.LARGE) -> ConvOutput:
    if op.x.is_cpu:
        return winograd.conv3x3_forward(op, largest_tile) if op.groups == 1 else grouped.conv3x3_forward(op)
    x, weight, stride, *fused, relu, save_mask, save_stats, _ = op
    last = relu, save_stats, winograd.NONE, stride, save_mask
    y, mask, mean, var, _ = LIBRARY.conv3x3_forward(x, winograd.channels_last(weight), *fused, *last)
    return ConvOutput(y, mask, mean, var)


def conv3x3_backward_input(op: Conv3x3BackwardInput) -> tuple[Tensor, Tensor | None]:
    dy, _, weight, _, c, v, g, relu, *shortcut = op
    args = dy, winograd.channels_last(weight), *shortcut, winograd.NONE
    if v is None or g is None:
        dx, dc, _ = LIBRARY.conv3x3_backward_input(*args)
    else:
        dx, dc, _ = LIBRARY.conv3x3_backward_input(*args, c, v.scale, v.shift, g.A, g.B, g.K, relu)
    return dx, dc


def conv1x1_backward_input(op: Conv1x1BackwardInput) -> tuple[Tensor, Tensor]:
    dy, c, v, g, weight, relu, shortcut_dy, shortcut_mask = op
    bn = v.scale, v.shift, g.A, g.B, g.K
    return LIBRARY.conv1x1_backward_input(dy, c, *bn, weight, relu, shortcut_dy, shortcut_mask)


def conv1x1_backward_weight(op: Conv1x1BackwardWeight) -> tuple[Tensor, Tensor]:
    return LIBRARY.conv1x1_backward_weight(*op)


def gram(op: Gram) -> tuple[Tensor, Tensor]:
    return LIBRARY.gram(*op)


def gram_output_stats(op: GramOutputStats) -> tuple[Tensor, Tensor, Tensor]:
    return LIBRARY.gram_output_stats(*op)


def gram_backward_coefficients(op: GramBackwardCoefficients) -> GramGrads:
    r, sum_dz, weight, bias, v, *rest = op
    return GramGrads(
        *LIBRARY.gram_backward_coefficients(r, sum_dz, weight, bias, v.mean, v.invstd, v.scale, *rest)
    )


def conv1x1_gram_backward_input(op: Conv1x1GramBackwardInput) -> tuple[Tensor, Tensor, Tensor]:
    dy, mask, c, v, *coefficients = op
    return LIBRARY.conv1x1_gram_backward_input(dy, mask, c, v.mean, v.scale, v.shift, *coefficients)


def conv_backward_weight(op: ConvBackwardWeight, largest_tile: int = winograd.LARGE) -> Tensor:
    if op.groups != 1:
        return grouped.conv_backward_weight(op)
    if winograd.takes(op, largest_tile):
        return winograd.conv_backward_weight(op, largest_tile)
    dy, x, kernel_size, stride, padding, dilation, *_ = op
    return LIBRARY.conv_backward_weight(dy, x, *kernel_size, *stride, *padding, *dilation)


def conv_backward_input(op: ConvBackwardInput, largest_tile: int = winograd.LARGE) -> Tensor:
    if op.groups != 1:
        return grouped.conv_backward_input(op)
    if winograd.takes(op, largest_tile):
        return winograd.conv_backward_input(op, largest_tile)
    dy, _, weight, stride, _, _, _, shortcut_dy, shortcut_mask, reuse_shortcut = op
    in_place = shortcut_dy is not None and shortcut_mask is None and reuse_shortcut
    if tuple(stride) == (1, 1) and not in_place:
        dx = kept_memory.take_like(op.x)
        if dx is None:
            return LIBRARY.conv_backward_input(dy, weight, shortcut_dy, shortcut_mask)
        LIBRARY.conv_backward_input_out(dy, weight, shortcut_dy, shortcut_mask, dx)
        return dx
    assert shortcut_dy is not None  # with a stride there is no kernel but the one that adds
    dx = shortcut_dy if in_place else shortcut_dy.clone()
    LIBRARY.conv_backward_input_(dx, dy, weight, *stride)
    increment_version(dx)
    return dx


FUNCTIONS: dict[type, Function] = {
    BnStats: bn_stats,
    BnScaleShift: bn_scale_shift,
    BnAddReluForward: bn_add_relu_forward,
    BnAddReluBackwardReduce: bn_add_relu_backward_reduce,
    BnBackwardCoefficients: bn_backward_coefficients,
    BnAddReluBackwardInput: bn_add_relu_backward_input,
    ReluBackward: relu_backward,
    BnReluMaxpoolForward: bn_relu_maxpool_forward,
    BnReluMaxpoolBackwardReduce: bn_relu_maxpool_backward_reduce,
    BnReluMaxpoolBackwardInput: bn_relu_maxpool_backward_input,
    Conv1x1Forward: conv1x1_forward,
    Conv1x1BackwardInput: conv1x1_backward_input,
    Conv1x1BackwardWeight: conv1x1_backward_weight,
    Gram: gram,
    GramOutputStats: gram_output_stats,
    GramBackwardCoefficients: gram_backward_coefficients,
    Conv1x1GramBackwardInput: conv1x1_gram_backward_input,
    Conv3x3Forward: conv3x3_forward,
    Conv3x3BackwardInput: conv3x3_backward_input,
    ConvBackwardWeight: conv_backward_weight,
    ConvBackwardInput: conv_backward_input,
}
# no convolution has more error than a direct one: the weight gradient of F(2x2, 3x3) may have
STRICT_FUNCTIONS: dict[type, Function] = {
    Conv3x3Forward: partial(conv3x3_forward, largest_tile=winograd.SMALL),
    ConvBackwardWeight: partial(conv_backward_weight, largest_tile=winograd.NONE),
    ConvBackwardInput: partial(conv_backward_input, largest_tile=winograd.SMALL),
}
STRICT_REASONS: dict[type, Reason] = {
    Conv3x3Forward: partial(conv3x3_reason, largest_tile=winograd.SMALL),
    ConvBackwardWeight: partial(weight_gradient_reason, largest_tile=winograd.NONE),
    ConvBackwardInput: partial(input_gradient_reason, largest_tile=winograd.SMALL),
}


@cache
def made(strict: bool, measured: bool) -> Backend:
    functions = {**FUNCTIONS, **STRICT_FUNCTIONS} if strict else FUNCTIONS
    reasons = {**REASONS, **STRICT_REASONS} if strict else REASONS
    return Backend(library.NAME, functions, products.on_both_devices(reasons, measured))


NATIVE = made(strict=False, measured=False)


def backend(strict: bool = False, measured: bool = False) -> Backend:
    """The native backend, its library loaded.

    Args:
        strict: as `accuracy="strict"` of `fusedres.patch`.
        measured: without products on GPUs where nobody has measured them against what else serves the op.

    Raises:
        BackendUnavailableError: the library is not there or does not load.
    """
    library.load()
    return made(strict, measured)
