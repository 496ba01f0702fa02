"""What the compiled kernels do not serve, and why: for each raw op a function from its record to a code, or None.

Other dtypes, memory formats and devices, ops without a kernel, and what a library does as fast.
"""

from __future__ import annotations

import warnings
from functools import cache
from math import prod

import torch
from torch import Tensor

from fusedres.ops.backend import Reason
from fusedres.ops.contract import (
    BnAddReluBackwardInput,
    BnAddReluBackwardReduce,
    BnAddReluForward,
    BnBackwardCoefficients,
    BnReluMaxpoolBackwardInput,
    BnReluMaxpoolBackwardReduce,
    BnReluMaxpoolForward,
    BnScaleShift,
    BnStats,
    Conv1x1Forward,
    Conv3x3Forward,
    ConvBackwardInput,
    ConvBackwardWeight,
    ReluBackward,
)
from fusedres.ops.native import grouped, winograd

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

# conv_backward_weight, against oneDNN 3.12 at ResNet-50's shapes, batch 16, on two cores each of Zen 3, Zen 5 and
# Cascade Lake; bfloat16 on Zen 5
FEWEST_CHANNELS = 64
FEWEST_WEIGHTS = {torch.float32: 256 * 256, torch.bfloat16: 64 * 256}  # of a pointwise convolution
FEWEST_SUMMED = 128  # channels of bfloat16, of a 1x1 convolution in inference: on Zen 5
FEWEST_ALONE = 64  # channels of a 1x1 convolution without BN after it: on Zen 4, with AVX-512 and with AVX2
FEWEST_WEIGHTS_PER_THREAD = 2048  # with fewer, shares are too small or unequal


@cache
def device_reason(device: torch.device) -> str | None:
    """Why the library does not run on this device, or None; warns, once, where a GPU is not served."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"device_{device.type}"
    problem = torch.ops.fusedres_native.cuda_device_problem(device.index or 0)
    if not problem:
        return None
    warnings.warn(
        f"fusedres: libfusedres_native.so does not run on {device} ({torch.cuda.get_device_name(device)}): {problem}. "
        "Other backends serve it; `fusedres doctor` says what to install.",
        RuntimeWarning,
        stacklevel=2,
    )
    return "no_code_for_device"


def activations_reason(first: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels do not take these activations together, or None."""
    device, dtype = first.device, first.dtype
    if not first.is_cpu and (reason := device_reason(device)) is not None:
        return reason
    if dtype not in DTYPES[device.type]:
        return f"dtype_{str(dtype).removeprefix('torch.')}"
    for t in (first, *others):
        if t is None:
            continue
        if t.dim() != 4:
            return "not_four_dimensional"
        if t is not first and (reason := unlike(t, dtype, device)) is not None:
            return reason
        if not t.is_contiguous(memory_format=torch.channels_last):
            return "not_channels_last"
    return None if first.shape[1] else "no_channels"


def unlike(t: Tensor, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why t does not go with tensors of this dtype and device, or None."""
    if t.dtype is not dtype:
        return "mixed_dtypes"
    return None if t.device == device else "mixed_devices"


def vectors_reason(first: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels do not take these channel vectors, or None."""
    device = first.device
    if not first.is_cpu and (reason := device_reason(device)) is not None:
        return reason
    for v in (first, *others):
        if v is None:
            continue
        if v.dtype is not torch.float32:
            return "vector_not_float32"
        if not v.is_contiguous():
            return "vector_not_dense"
        if v is not first and v.device != device:
            return "mixed_devices"
    return None


@cache
def product_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that the direct kernels of convolutions multiply on this processor: none where oneDNN is wider."""
    if torch.ops.fusedres_native.cpu_library_is_wider():
        return ()
    half = torch.ops.fusedres_native.cpu_products_of_bfloat16()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)


def weight_gradient_reason(op: ConvBackwardWeight, largest_tile: int = winograd.LARGE) -> str | None:
    """oneDNN is left what it does as fast: few channels, pointwise convolutions without many, and many threads."""
    dy, x = op.dy, op.x
    if not x.is_cpu or x.dtype not in product_dtypes():
        return "no_kernel"
    if op.groups != 1:
        return grouped.weight_gradient_reason(op) or activations_reason(x, dy)
    if winograd.takes(op, largest_tile):
        return activations_reason(x, dy) or given_reason(op.in_scale, op.in_shift)
    if op.in_scale is not None:
        return "no_prologue"
    cin, cout = x.shape[1], dy.shape[1]
    pointwise = tuple(op.kernel_size) == tuple(op.stride) == (1, 1)
    if min(cin, cout) < FEWEST_CHANNELS or (pointwise and cin * cout < FEWEST_WEIGHTS[x.dtype]):
        return "library_as_fast"
    if cin * cout * prod(op.kernel_size) < FEWEST_WEIGHTS_PER_THREAD * torch.get_num_threads():
        return "too_many_threads"
    return activations_reason(x, dy)


def pointwise_reason(x: Tensor, weight: Tensor, depth: int) -> str | None:
    """Why the kernels do not take a 1x1 convolution between x's channels and others; depth: those summed over."""
    if not x.is_cpu or x.dtype not in product_dtypes():
        return "no_kernel"
    if weight.shape[2:] != (1, 1):
        return "not_pointwise"
    if x.dtype != torch.float32 and depth % 2:
        return "odd_channels"
    if weight.dtype != x.dtype:
        return "mixed_dtypes"
    return None if weight.is_contiguous(memory_format=torch.channels_last) else "not_channels_last"


def conv1x1_reason(op: Conv1x1Forward) -> str | None:
    """The product alone, with the statistics of its results; or in inference, where BN's vectors are known before."""
    x, raw = op.x, op.scale is None
    if op.save_mask or op.in_scale is not None:
        return "in_training"
    if (op.residual is not None or op.relu) if raw else op.save_stats:
        return "in_training"
    if op.bias is not None:
        return "stride_or_bias"
    if (reason := pointwise_reason(x, op.weight, x.shape[1])) is not None:
        return reason
    if raw and (x.dtype != torch.float32 or min(op.weight.shape[:2]) < FEWEST_ALONE):
        return "library_as_fast"
    if x.dtype != torch.float32 and x.shape[1] < FEWEST_SUMMED:
        return "library_as_fast"
    if (reason := activations_reason(x, op.residual)) is not None:
        return reason
    return given_reason(op.scale, op.shift, op.residual_scale, op.residual_shift)


def conv3x3_reason(op: Conv3x3Forward, largest_tile: int = winograd.LARGE) -> str | None:
    """By Winograd's algorithm, in float32 on a CPU, without stride; the mask is BN's to make."""
    x, weight = op.x, op.weight
    if not x.is_cpu or x.dtype != torch.float32:
        return "no_kernel"
    if op.groups != 1:
        if x.dtype not in product_dtypes():
            return "no_kernel"
        return grouped.forward_reason(op) or activations_reason(x) or given_reason(op.scale, op.shift)
    if op.stride != 1:
        return "stride_or_bias"
    if (
        op.save_mask
        or (op.residual is not None and op.scale is None)
        or (op.save_stats and op.scale is not None)
    ):
        return "mask"
    if weight.dtype != x.dtype:
        return "mixed_dtypes"
    tile = winograd.forward_tile(op, largest_tile)
    if (reason := winograd.reason(x, x.shape[1], weight.shape[0], tile)) is not None:
        return reason
    if (reason := activations_reason(x, op.residual)) is not None or x.numel() == 0:
        return reason or "empty"
    return given_reason(op.in_scale, op.in_shift, op.scale, op.shift, op.residual_scale, op.residual_shift)


def given_reason(*vectors: Tensor | None) -> str | None:
    """As `vectors_reason`, of those that are not None."""
    given = [v for v in vectors if v is not None]
    return vectors_reason(*given) if given else None


def input_gradient_reason(op: ConvBackwardInput, largest_tile: int = winograd.LARGE) -> str | None:
    """A 1x1 convolution's is a product, added where eager stores it and adds it in a pass of its own."""
    dy, x = op.dy, op.x
    if op.groups != 1 and x.is_cpu and x.dtype in product_dtypes():
        return grouped.input_gradient_reason(op) or activations_reason(dy, x)
    if winograd.takes(op, largest_tile):
        if op.weight.dtype != x.dtype:
            return "mixed_dtypes"
        if op.shortcut_mask is not None and x.shape[1] % 8 != 0:
            return "mask"
        return activations_reason(x, dy, op.shortcut_dy)
    if tuple(op.padding) != (0, 0) or op.groups != 1:
        return "not_pointwise"
    if (reason := pointwise_reason(x, op.weight, dy.shape[1])) is not None:
        return reason
    strided = tuple(op.stride) != (1, 1)
    if op.shortcut_dy is None and (strided or x.dtype != torch.float32):
        return "library_as_fast"
    if op.shortcut_mask is not None and (strided or x.shape[1] % 8 != 0):
        return "mask"
    return activations_reason(x, dy, op.shortcut_dy)


REASONS: dict[type, Reason] = {
    BnStats: lambda op: activations_reason(op.c),
    BnScaleShift: lambda op: vectors_reason(op.mean, op.var, op.weight, op.bias),
    BnAddReluForward: lambda op: activations_reason(op.c, op.residual),
    BnAddReluBackwardReduce: lambda op: activations_reason(op.c, op.dy, op.shortcut_c),
    BnBackwardCoefficients: lambda op: vectors_reason(op.sum_dz, *op.vectors),
    BnAddReluBackwardInput: lambda op: activations_reason(op.c, op.dy, op.shortcut_c),
    ReluBackward: lambda op: activations_reason(op.dy),
    BnReluMaxpoolForward: lambda op: activations_reason(op.c),
    BnReluMaxpoolBackwardReduce: lambda op: activations_reason(op.c, op.dy),
    BnReluMaxpoolBackwardInput: lambda op: activations_reason(op.c, op.dy),
    Conv1x1Forward: conv1x1_reason,
    Conv3x3Forward: conv3x3_reason,
    ConvBackwardWeight: weight_gradient_reason,
    ConvBackwardInput: input_gradient_reason,
}
