"""What the compiled kernels do not serve, and why: one reason code for each call of a raw op, or None.

Other dtypes, memory formats and devices, ops without a kernel, and what a library does as fast.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

# conv_backward_weight, against oneDNN 3.12 at ResNet-50's shapes, batch 16, on two cores each of Zen 3, Zen 5 and
# Cascade Lake; bfloat16 on Zen 5
FEWEST_CHANNELS = 64
FEWEST_WEIGHTS = {torch.float32: 256 * 256, torch.bfloat16: 64 * 256}  # of a pointwise convolution
FEWEST_SUMMED = 128  # channels of bfloat16, of a 1x1 convolution in inference: on Zen 5
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


def activations_reason(*activations: Tensor | None) -> str | None:
    """Why the kernels do not take these activations together, or None. The first is not None."""
    first = activations[0]
    assert first is not None
    device, dtype = first.device, first.dtype
    if not first.is_cpu and (reason := device_reason(device)) is not None:
        return reason
    if dtype not in DTYPES[device.type]:
        return f"dtype_{str(dtype).removeprefix('torch.')}"
    for t in activations:
        if t is None:
            continue
        if t.dim() != 4 or (t is not first and (t.dtype is not dtype or t.device != device)):
            return "arguments_differ"
        if not t.is_contiguous(memory_format=torch.channels_last):
            return "layout_not_channels_last"
    return None if first.shape[1] else "no_channels"


def vectors_reason(first: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels do not take these channel vectors, or None."""
    device = first.device
    if not first.is_cpu and (reason := device_reason(device)) is not None:
        return reason
    for v in (first, *others):
        if v is None:
            continue
        if v.dtype is not torch.float32 or not v.is_contiguous() or (v is not first and v.device != device):
            return "vector_not_float32"
    return None


def forward_reason(
    c: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, *rest: Any, **flags: bool
):
    return activations_reason(c, residual)


def reduce_reason(dy, c, vectors, mask=None, relu=True, shortcut_c=None, *rest, **flags):
    return activations_reason(c, dy, shortcut_c)


def input_reason(dy, c, vectors, grads, mask=None, relu=True, shortcut_c=None, *rest, **flags):
    return activations_reason(c, dy, shortcut_c)


@cache
def product_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that the kernels of convolutions multiply on this processor."""
    half = torch.ops.fusedres_native.cpu_products_of_bfloat16()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)


def weight_gradient_reason(dy, x, kernel_size, stride, padding, dilation, groups):
    """oneDNN is left what it does as fast: few channels, pointwise convolutions without many, and many threads."""
    if x.device.type != "cpu" or x.dtype not in product_dtypes():
        return "no_kernel"
    if groups != 1:
        return "groups"
    cin, cout = x.shape[1], dy.shape[1]
    pointwise = tuple(kernel_size) == tuple(stride) == (1, 1)
    if min(cin, cout) < FEWEST_CHANNELS or (pointwise and cin * cout < FEWEST_WEIGHTS[x.dtype]):
        return "library_as_fast"
    if cin * cout * prod(kernel_size) < FEWEST_WEIGHTS_PER_THREAD * torch.get_num_threads():
        return "too_many_threads"
    if dy.dim() != 4 or dy.dtype != x.dtype or dy.device != x.device:
        return "arguments_differ"
    channels_last = all(t.is_contiguous(memory_format=torch.channels_last) for t in (dy, x))
    return None if channels_last else "layout_not_channels_last"


def pointwise_reason(x: Tensor, weight: Tensor, depth: int) -> str | None:
    """Why the kernels do not take a 1x1 convolution between x's channels and others; depth: those summed over."""
    if x.device.type != "cpu" or x.dtype not in product_dtypes():
        return "no_kernel"
    if weight.shape[2:] != (1, 1):
        return "not_pointwise"
    if x.dtype != torch.float32 and depth % 2:
        return "odd_channels"
    if weight.dtype != x.dtype or not weight.is_contiguous(memory_format=torch.channels_last):
        return "arguments_differ"
    return None


def product_reason(
    x,
    weight,
    bias=None,
    stride=1,
    in_scale=None,
    in_shift=None,
    scale=None,
    shift=None,
    residual=None,
    residual_scale=None,
    residual_shift=None,
    relu=False,
    save_mask=False,
    save_stats=False,
):
    """In inference, where BN's vectors are known before the product: it is stored once, and nothing else."""
    if scale is None or save_mask or save_stats or in_scale is not None:
        return "in_training"
    if stride != 1 or bias is not None:
        return "stride_or_bias"
    if (reason := pointwise_reason(x, weight, x.shape[1])) is not None:
        return reason
    if x.dtype != torch.float32 and x.shape[1] < FEWEST_SUMMED:
        return "library_as_fast"
    return activations_reason(x, residual) or vectors_reason(scale, shift, residual_scale, residual_shift)


def input_gradient_reason(
    dy,
    x,
    weight,
    stride,
    padding,
    dilation,
    groups,
    shortcut_dy=None,
    shortcut_mask=None,
    reuse_shortcut=False,
):
    """A 1x1 convolution's is a product, added where eager stores it and adds it in a pass of its own."""
    if tuple(padding) != (0, 0) or groups != 1:
        return "not_pointwise"
    if (reason := pointwise_reason(x, weight, dy.shape[1])) is not None:
        return reason
    strided = tuple(stride) != (1, 1)
    if shortcut_dy is None and (strided or x.dtype != torch.float32):
        return "library_as_fast"
    if shortcut_mask is not None and (strided or x.shape[1] % 8 != 0):
        return "mask"
    return activations_reason(x, dy, shortcut_dy)


REASONS: dict[str, Callable[..., str | None]] = {
    "bn_stats": activations_reason,
    "bn_scale_shift": lambda mean, var, weight, bias, eps: vectors_reason(mean, var, weight, bias),
    "bn_add_relu_forward": forward_reason,
    "bn_add_relu_backward_reduce": reduce_reason,
    "bn_backward_coefficients": lambda sum_dz, centered, vectors, *rest: vectors_reason(sum_dz, *vectors),
    "bn_add_relu_backward_input": input_reason,
    "relu_backward": lambda dy, mask: activations_reason(dy),
    "bn_relu_maxpool_forward": lambda c, *rest, **flags: activations_reason(c),
    "bn_relu_maxpool_backward_reduce": lambda dy, indices, c, *rest: activations_reason(c, dy),
    "bn_relu_maxpool_backward_input": lambda dy, indices, c, *rest: activations_reason(c, dy),
    "conv_backward_weight": weight_gradient_reason,
    "conv1x1_forward": product_reason,
    "conv_backward_input": input_gradient_reason,
}
