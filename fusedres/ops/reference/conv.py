"""Convolutions, with what is fused to them; see `fusedres.ops.reference`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from fusedres.ops.backend import Function
from fusedres.ops.contract import (
    BnStats,
    Conv1x1BackwardInput,
    Conv1x1Forward,
    Conv3x3BackwardInput,
    Conv3x3Forward,
    ConvBackwardInput,
    ConvBackwardWeight,
    ConvOutput,
    accumulation_dtype,
)
from fusedres.ops.reference.bn import bn_stats
from fusedres.ops.reference.values import (
    activation,
    apply_coefficients,
    masked_gradient,
    memory_format,
    normalised,
    rectified,
    selected,
)


def activated(op: Conv1x1Forward | Conv3x3Forward | ConvBackwardWeight) -> Tensor:
    """a of x, by the prologue where there is one."""
    if op.in_scale is None or op.in_shift is None:
        return op.x
    return activation(op.x, op.in_scale, op.in_shift)


def convolved(
    op: Conv1x1Forward | Conv3x3Forward, bias: Tensor | None, padding: int, groups: int = 1
) -> ConvOutput:
    """Prologue, convolution and epilogue of a forward."""
    acc, a = accumulation_dtype(op.x.dtype), activated(op)
    bias = None if bias is None else bias.to(acc)
    conv = F.conv2d(a.to(acc), op.weight.to(acc), bias, op.stride, padding, groups=groups)
    z = normalised(conv, op.scale, op.shift, op.residual, op.residual_scale, op.residual_shift)
    z = z.to(op.x.dtype).contiguous(memory_format=memory_format(op.x))  # the library's is the weight's
    y, mask = rectified(z, op.relu, op.save_mask)
    mean, var = bn_stats(BnStats(y)) if op.save_stats else (None, None)
    return ConvOutput(y, mask, mean, var)


def conv1x1_forward(op: Conv1x1Forward) -> ConvOutput:
    return convolved(op, op.bias, 0)


def conv3x3_forward(op: Conv3x3Forward) -> ConvOutput:
    return convolved(op, None, 1, op.groups)


def conv1x1_backward_input(op: Conv1x1BackwardInput) -> tuple[Tensor, Tensor]:
    acc = op.vectors.scale.dtype
    dz = masked_gradient(op.dy, op.c, op.vectors, None, op.relu)
    dc = apply_coefficients(dz, op.c, op.grads, op.vectors.mean)
    dx = F.conv_transpose2d(dc.to(acc), op.weight.to(acc))  # dc W, [N, Cin, H, W]
    if op.shortcut_dy is not None:
        dx = dx + selected(op.shortcut_dy, op.shortcut_mask)
    return dx.to(op.c.dtype).contiguous(memory_format=memory_format(op.c)), dc


def conv3x3_backward_input(op: Conv3x3BackwardInput) -> tuple[Tensor, Tensor | None]:
    acc, dc = accumulation_dtype(op.dy.dtype), None
    if op.c is not None and op.vectors is not None and op.grads is not None:
        dz = masked_gradient(op.dy, op.c, op.vectors, None, op.relu)
        dc = apply_coefficients(dz, op.c, op.grads, op.vectors.mean)
    dy = op.dy if dc is None else dc
    dx = conv2d_input(list(op.x.shape), op.weight.to(acc), dy.to(acc), op.stride, 1)
    if op.shortcut_dy is not None:
        dx = dx + selected(op.shortcut_dy, op.shortcut_mask)
    return torch.empty_like(op.x).copy_(dx), dc


def conv_backward_weight(op: ConvBackwardWeight) -> Tensor:
    dy, x = op.dy, activated(op)
    weight = x.new_empty((dy.shape[1], x.shape[1] // op.groups, *op.kernel_size))  # only its shape is read
    window = op.stride, op.padding, op.dilation, False, (0, 0), op.groups
    _, dw, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *window, [False, True, False])
    return dw.to(accumulation_dtype(x.dtype)).contiguous(memory_format=memory_format(x))


def conv_backward_input(op: ConvBackwardInput) -> Tensor:
    window = op.stride, op.padding, op.dilation, False, (0, 0), op.groups
    dx, _, _ = torch.ops.aten.convolution_backward(
        op.dy, op.x, op.weight, None, *window, [True, False, False]
    )
    if op.shortcut_dy is None:
        return dx
    if op.shortcut_mask is not None:
        return dx.add_(selected(op.shortcut_dy, op.shortcut_mask))
    return op.shortcut_dy.add_(dx) if op.reuse_shortcut else dx.add_(op.shortcut_dy)


FUNCTIONS: dict[type, Function] = {
    Conv1x1Forward: conv1x1_forward,
    Conv1x1BackwardInput: conv1x1_backward_input,
    Conv3x3Forward: conv3x3_forward,
    Conv3x3BackwardInput: conv3x3_backward_input,
    ConvBackwardWeight: conv_backward_weight,
    ConvBackwardInput: conv_backward_input,
}
