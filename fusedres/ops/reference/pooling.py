"""The stem: BN, ReLU and max-pooling; see `fusedres.ops.reference`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.ops.backend import Function
from fusedres.ops.contract import (
    BnReluMaxpoolBackwardInput,
    BnReluMaxpoolBackwardReduce,
    BnReluMaxpoolForward,
    accumulation_dtype,
)
from fusedres.ops.reference.values import activation, apply_coefficients, sums

NO_GRADIENT = 255  # pooling index of a window whose maximum is not positive


def bn_relu_maxpool_forward(op: BnReluMaxpoolForward) -> tuple[Tensor, Tensor | None]:
    window = op.kernel_size, op.stride, op.padding
    a = activation(op.c, op.scale, op.shift)
    if not op.save_indices:
        return F.max_pool2d(a, *window), None
    y, flat = F.max_pool2d(a, *window, return_indices=True)
    top, left = corners(y, op.stride, op.padding)
    width = op.c.shape[3]
    place = (flat // width - top) * op.kernel_size + (flat % width - left)
    return y, torch.where(y <= 0, NO_GRADIENT, place).to(torch.uint8)


def corners(y: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """The first row [H', 1] and column [W'] of each window of y [N, C, H', W']."""
    top = torch.arange(y.shape[2], device=y.device)[:, None] * stride - padding
    return top, torch.arange(y.shape[3], device=y.device) * stride - padding


def unpooled(op: BnReluMaxpoolBackwardReduce | BnReluMaxpoolBackwardInput) -> Tensor:
    """dz [N, C, H, W] in the accumulation dtype: each window's dy lands on its maximum."""
    c, acc = op.c, accumulation_dtype(op.c.dtype)
    top, left = corners(op.dy, op.stride, op.padding)
    place = op.indices.long()
    flat = (top + place // op.kernel_size) * c.shape[3] + left + place % op.kernel_size
    passes = place != NO_GRADIENT
    dz = torch.zeros(c.shape, dtype=acc, device=c.device).flatten(2)
    dz.scatter_add_(
        2, torch.where(passes, flat, 0).flatten(2), torch.where(passes, op.dy.to(acc), 0).flatten(2)
    )
    return dz.view(c.shape)


def bn_relu_maxpool_backward_reduce(op: BnReluMaxpoolBackwardReduce) -> tuple[Tensor, Tensor]:
    return sums(unpooled(op), op.c, op.vectors.mean)


def bn_relu_maxpool_backward_input(op: BnReluMaxpoolBackwardInput) -> Tensor:
    return apply_coefficients(unpooled(op), op.c, op.grads)


FUNCTIONS: dict[type, Function] = {
    BnReluMaxpoolForward: bn_relu_maxpool_forward,
    BnReluMaxpoolBackwardReduce: bn_relu_maxpool_backward_reduce,
    BnReluMaxpoolBackwardInput: bn_relu_maxpool_backward_input,
}
