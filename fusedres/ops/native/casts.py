"""Tensors in another dtype, all of them by one launch: a block's weights on a GPU, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.ops.native import library
from fusedres.ops.native.reasons import device_reason

PLAIN_TENSORS = Tensor, torch.nn.Parameter
DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def takes(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel casts this tensor to another dtype."""
    if not tensor.is_cuda or type(tensor) not in PLAIN_TENSORS or not {tensor.dtype, dtype} <= DTYPES:
        return False
    if not library.is_loaded() or device_reason(tensor.device) is not None:
        return False
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def cast_into(to: list[Tensor], tensors: list[Tensor]) -> None:
    """One launch: all of `to` have one dtype, and all of `tensors`, of whose sizes and strides they are."""
    torch.ops.fusedres_native.cast_(to, tensors)


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each in that dtype, as `t.to(dtype)`; each itself where it has that dtype already."""
    made = [t.to(dtype) if t.dtype is dtype or not takes(t, dtype) else None for t in tensors]
    rest = [t for t, m in zip(tensors, made, strict=True) if m is None]
    if not rest:
        return made  # type: ignore[return-value]
    found = [torch.empty_like(t, dtype=dtype) for t in rest]
    for source in {t.dtype for t in rest}:
        pairs = [(f, t) for f, t in zip(found, rest, strict=True) if t.dtype is source]
        cast_into([f for f, _ in pairs], [t for _, t in pairs])
    casts = iter(found)
    return [next(casts) if m is None else m for m in made]
