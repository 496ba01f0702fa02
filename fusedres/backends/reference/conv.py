"""Convolutions, with what is fused to them; see `fusedres.backends.reference`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.backends.backend import Function
from fusedres.backends.reference.bn import bn_stats
from fusedres.backends.reference.values import (
    activation,
    apply_coefficients,
    masked_gradient,
    normalised,
    rectified,
    selected,
)
from fusedres.raw_ops import (
    BnStats,
    Conv1x1BackwardInput,
    Conv1x1Forward,
    ConvBackwardInput,
    ConvBackwardWeight,
    ConvOutput,
    accumulation_dtype,
)


def conv1x1_forward(op: Conv1x1Forward) -> ConvOutput:
    acc = accumulation_dtype(op.x.dtype)
    a = op.x if op.in_scale is None or op.in_shift is None else activation(op.x, op.in_scale, op.in_shift)
    conv = F.conv2d(a.to(acc), op.weight.to(acc), None if op.bias is None else op.bias.to(acc), op.stride)
    z = normalised(conv, op.scale, op.shift, op.residual, op.residual_scale, op.residual_shift)
    y, mask = rectified(z.to(op.x.dtype), op.relu, op.save_mask)
    mean, var = bn_stats(BnStats(y)) if op.save_stats else (None, None)
    return ConvOutput(y, mask, mean, var)


def conv1x1_backward_input(op: Conv1x1BackwardInput) -> tuple[Tensor, Tensor]:
    acc = op.vectors.scale.dtype
    dz = masked_gradient(op.dy, op.c, op.vectors, None, op.relu)
    dc = apply_coefficients(dz, op.c, op.grads, op.vectors.mean)
    dx = F.conv_transpose2d(dc.to(acc), op.weight.to(acc))  # dc W, [N, Cin, H, W]
    if op.shortcut_dy is not None:
        dx = dx + selected(op.shortcut_dy, op.shortcut_mask)
    return dx.to(op.c.dtype), dc


def conv_backward_weight(op: ConvBackwardWeight) -> Tensor:
    dy, x = op.dy, op.x
    weight = x.new_empty((dy.shape[1], x.shape[1] // op.groups, *op.kernel_size))  # only its shape is read
    window = op.stride, op.padding, op.dilation, False, (0, 0), op.groups
    _, dw, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *window, [False, True, False])
    like_x = torch.empty_like(x).is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if like_x else torch.contiguous_format
    return dw.to(accumulation_dtype(x.dtype)).contiguous(memory_format=layout)


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
    ConvBackwardWeight: conv_backward_weight,
    ConvBackwardInput: conv_backward_input,
}
