"""3x3 convolutions with groups, of float32 on a CPU (csrc/cpu/grouped_kernels.h): which calls, and the calls.

oneDNN is at half the machine's limit or less with groups of 4 and 8 channels, the first stages of a ResNeXt, and near
it with more: then a forward is taken alone, where BN and ReLU come with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops.contract import Conv3x3Forward, ConvBackwardInput, ConvBackwardWeight, ConvOutput
from fusedres.ops.native import kept_memory
from fusedres.ops.native.winograd import LANES, channels_last, instruction_set

LIBRARY = torch.ops.fusedres_native  # empty until the library is loaded

FEWEST_IN_GROUP = 4
MOST_IN_GROUP = 8  # bench/results/cpu_avx512/README.md
MOST_IN_GROUP_WITH_BN = 16


def fits(channels: int, in_group: int) -> bool:
    """Whether groups of so many channels fill this processor's vectors; as `grouped_fits` in csrc/cpu."""
    lanes = LANES[instruction_set()]
    whole = lanes % in_group == 0 if in_group < lanes else in_group % lanes == 0
    return in_group % FEWEST_IN_GROUP == 0 and whole and channels % lanes == 0


def reason(x: Tensor, results: int, in_group: int, most: int) -> str | None:
    """Why a convolution of images x [N, C, H, W] with groups of in_group is left to the library, or None."""
    if x.dim() != 4 or not x.is_cpu or x.dtype != torch.float32 or x.shape[1] != results:
        return "groups"
    if x.numel() == 0:
        return "empty"
    return None if FEWEST_IN_GROUP <= in_group <= most and fits(results, in_group) else "groups"


def forward_reason(op: Conv3x3Forward) -> str | None:
    """Why this convolution with groups is left to the library, or None."""
    if (
        op.in_scale is not None
        or op.residual is not None
        or op.save_mask
        or (op.save_stats and op.scale is not None)
    ):
        return "groups"
    if op.weight.dtype != op.x.dtype:
        return "mixed_dtypes"
    most = MOST_IN_GROUP_WITH_BN if op.scale is not None and op.stride == 1 else MOST_IN_GROUP
    return reason(op.x, op.weight.shape[0], op.weight.shape[1], most)


def is_3x3(op: ConvBackwardInput | ConvBackwardWeight) -> bool:
    kernel = op.kernel_size if isinstance(op, ConvBackwardWeight) else op.weight.shape[2:]
    stride, padded = tuple(op.stride), (tuple(op.padding), tuple(op.dilation)) == ((1, 1), (1, 1))
    return tuple(kernel) == (3, 3) and padded and stride in ((1, 1), (2, 2))


def weight_gradient_reason(op: ConvBackwardWeight) -> str | None:
    if not is_3x3(op) or op.in_scale is not None:
        return "groups"
    channels = op.dy.shape[1]
    if (why := reason(op.x, channels, channels // op.groups, MOST_IN_GROUP)) is not None:
        return why
    vectors = channels // LANES[instruction_set()]
    return "too_many_threads" if torch.get_num_threads() > vectors else None


def input_gradient_reason(op: ConvBackwardInput) -> str | None:
    if not is_3x3(op) or tuple(op.stride) != (1, 1) or op.shortcut_dy is not None:
        return "groups"
    if op.weight.dtype != op.x.dtype:
        return "mixed_dtypes"
    return reason(op.dy, op.x.shape[1], op.weight.shape[1], MOST_IN_GROUP)


def conv3x3_forward(op: Conv3x3Forward) -> ConvOutput:
    args = op.x, channels_last(op.weight), op.stride, op.scale, op.shift, op.relu
    y = kept_memory.take_result(op)
    if y is None:
        y = LIBRARY.grouped_conv3x3_forward(*args)
    else:
        LIBRARY.grouped_conv3x3_forward_out(*args, y)
    mean, var = LIBRARY.bn_stats(y) if op.save_stats else (None, None)
    return ConvOutput(y, None, mean, var)


def conv_backward_weight(op: ConvBackwardWeight) -> Tensor:
    return LIBRARY.grouped_conv3x3_backward_weight(op.dy, op.x, op.x.shape[1] // op.groups, op.stride[0])


def conv_backward_input(op: ConvBackwardInput) -> Tensor:
    return LIBRARY.grouped_conv3x3_backward_input(op.dy, channels_last(op.weight))
