"""Every raw op without its values: fresh tensors of the right shapes, dtypes and memory formats.

What torch runs in place of an operator while it traces. Only `fusedres.ops.contract` counts here, and the habits of no
backend; the checks of every raw op hold these results against every backend's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops.backend import Backend, Function
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
    accumulation_dtype,
)


def vector(like: Tensor, channels: int) -> Tensor:
    """[channels] in the accumulation dtype of `like`."""
    return like.new_empty((channels,), dtype=accumulation_dtype(like.dtype))


def packed_mask(y: Tensor) -> Tensor:
    return y.new_empty(((y.numel() + 7) // 8,), dtype=torch.uint8)


def activation(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Of this shape, in the memory format of `like`."""
    channels_last = torch.empty_like(like).is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def bn_stats(op: BnStats) -> tuple[Tensor, Tensor]:
    return vector(op.c, op.c.shape[1]), vector(op.c, op.c.shape[1])


def bn_scale_shift(op: BnScaleShift) -> BatchNormVectors:
    return BatchNormVectors(op.mean, op.var, *(torch.empty_like(op.mean) for _ in range(3)))


def bn_add_relu_forward(op: BnAddReluForward) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(op.c)
    return y, packed_mask(y) if op.save_mask else None


def bn_add_relu_backward_reduce(op: BnAddReluBackwardReduce) -> tuple[Tensor, Tensor, Tensor | None]:
    sum_dz, sum_dz_centered, sum_dz_shortcut = (vector(op.c, op.c.shape[1]) for _ in range(3))
    return sum_dz, sum_dz_centered, None if op.shortcut_c is None else sum_dz_shortcut


def bn_backward_coefficients(op: BnBackwardCoefficients) -> BatchNormGrads:
    dweight, B, K = (torch.empty_like(op.sum_dz) for _ in range(3))
    return BatchNormGrads(dweight, op.sum_dz, op.vectors.scale, *((B, K) if op.training else (None, None)))


def bn_add_relu_backward_input(op: BnAddReluBackwardInput) -> tuple[Tensor, Tensor | None]:
    if op.shortcut_c is not None:
        return torch.empty_like(op.c), torch.empty_like(op.shortcut_c)
    return torch.empty_like(op.c), torch.empty_like(op.c) if op.save_dz else None


def relu_backward(op: ReluBackward) -> Tensor:
    return torch.empty_like(op.dy)


def bn_relu_maxpool_forward(op: BnReluMaxpoolForward) -> tuple[Tensor, Tensor | None]:
    h, w = ((n + 2 * op.padding - op.kernel_size) // op.stride + 1 for n in op.c.shape[2:])
    y = activation(op.c, (op.c.shape[0], op.c.shape[1], h, w))
    return y, torch.empty_like(y, dtype=torch.uint8) if op.save_indices else None


def bn_relu_maxpool_backward_reduce(op: BnReluMaxpoolBackwardReduce) -> tuple[Tensor, Tensor]:
    return vector(op.c, op.c.shape[1]), vector(op.c, op.c.shape[1])


def bn_relu_maxpool_backward_input(op: BnReluMaxpoolBackwardInput) -> Tensor:
    return torch.empty_like(op.c)


def convolved(x: Tensor, cout: int, height: int, width: int, save_mask: bool, save_stats: bool) -> ConvOutput:
    """Of a fused convolution of x whose output has this many channels and this height and width."""
    y = activation(x, (x.shape[0], cout, height, width))
    mean, var = (vector(x, cout), vector(x, cout)) if save_stats else (None, None)
    return ConvOutput(y, packed_mask(y) if save_mask else None, mean, var)


def conv1x1_forward(op: Conv1x1Forward) -> ConvOutput:
    h, w = ((n - 1) // op.stride + 1 for n in op.x.shape[2:])
    return convolved(op.x, op.weight.shape[0], h, w, op.save_mask, op.save_stats)


def conv3x3_forward(op: Conv3x3Forward) -> ConvOutput:
    h, w = ((n - 1) // op.stride + 1 for n in op.x.shape[2:])
    return convolved(op.x, op.weight.shape[0], h, w, op.save_mask, op.save_stats)


def conv3x3_backward_input(op: Conv3x3BackwardInput) -> tuple[Tensor, Tensor | None]:
    return torch.empty_like(op.x), None if op.c is None else torch.empty_like(op.c)


def gram(op: Gram) -> tuple[Tensor, Tensor]:
    cin = op.c.shape[1]
    return vector(op.c, cin), op.scale.new_empty((cin, cin), dtype=accumulation_dtype(op.c.dtype))


def gram_output_stats(op: GramOutputStats) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = (op.m.new_empty((op.weight.shape[0],)) for _ in range(2))
    return mean, var, torch.empty_like(op.m)


def gram_backward_coefficients(op: GramBackwardCoefficients) -> GramGrads:
    below = None if op.S is None else torch.empty_like(op.S), None if op.m is None else torch.empty_like(op.m)
    return GramGrads(torch.empty_like(op.sum_dz), torch.empty_like(op.r), torch.empty_like(op.r), *below)


def conv1x1_backward_weight(op: Conv1x1BackwardWeight) -> tuple[Tensor, Tensor]:
    cout, cin = op.dy.shape[1], op.c.shape[1]
    return op.scale.new_empty((cout, cin), dtype=accumulation_dtype(op.c.dtype)), vector(op.dy, cout)


def conv1x1_gram_backward_input(op: Conv1x1GramBackwardInput) -> tuple[Tensor, Tensor, Tensor]:
    cin = op.c.shape[1]
    return torch.empty_like(op.c), vector(op.c, cin), vector(op.c, cin)


def conv1x1_backward_input(op: Conv1x1BackwardInput) -> tuple[Tensor, Tensor]:
    n, _, h, w = op.c.shape
    return activation(op.c, (n, op.weight.shape[1], h, w)), torch.empty_like(op.c)


def conv_backward_weight(op: ConvBackwardWeight) -> Tensor:
    dw = activation(op.x, (op.dy.shape[1], op.x.shape[1] // op.groups, *op.kernel_size))
    return dw.to(accumulation_dtype(op.x.dtype))


def conv_backward_input(op: ConvBackwardInput) -> Tensor:
    return activation(op.x, op.x.shape)


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
    Gram: gram,
    GramOutputStats: gram_output_stats,
    GramBackwardCoefficients: gram_backward_coefficients,
    Conv1x1BackwardWeight: conv1x1_backward_weight,
    Conv1x1GramBackwardInput: conv1x1_gram_backward_input,
    Conv1x1BackwardInput: conv1x1_backward_input,
    Conv3x3Forward: conv3x3_forward,
    Conv3x3BackwardInput: conv3x3_backward_input,
    ConvBackwardWeight: conv_backward_weight,
    ConvBackwardInput: conv_backward_input,
}
FAKE = Backend("fake", FUNCTIONS)
