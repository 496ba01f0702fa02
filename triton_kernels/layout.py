"""Tensors as the kernels take them: NHWC rows, and fresh outputs."""

from functools import cache

import torch
from torch import Tensor


def cdiv(size: int, share: int) -> int:
    """How many shares cover the size. Triton's own, which kernels can call too, takes 25 times as long."""
    return -(-size // share)


def rows(x: Tensor) -> int:
    """P = N*H*W of x [N, C, H, W]."""
    return x.numel() // x.shape[1]


def nhwc(x: Tensor) -> Tensor:
    """x [N, C, H, W] itself if C values lie side by side and positions are dense, else such a copy."""
    return (
        x
        if x.is_contiguous(memory_format=torch.channels_last)
        else x.contiguous(memory_format=torch.channels_last)
    )


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor on like's device; four-dimensional ones in channels_last."""
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)


def capability(x: Tensor) -> int:
    """Major compute capability of x's device, 0 on a CPU."""
    return capability_of(x.device) if x.is_cuda else 0


@cache
def capability_of(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def precision(x: Tensor) -> str:
    """`input_precision` of tl.dot: float32 operands are multiplied unrounded; others have one way."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
