"""The one rule of accuracy: error against float64, judged by the error of eager PyTorch itself.

    err = ||actual - exact||_2 / ||exact||_2       pass: err <= 2*err(eager) + 8*eps(dtype)

The eager result comes from the same layout, dtype and thread count as the one under test.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64; the plain norm of `actual` where exact is all zero.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != exact.shape:
        raise ValueError(f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    norm = exact.norm().item()
    return (actual - exact).norm().item() / (norm or 1.0)


def error_limit(eager_error: float, dtype: torch.dtype) -> float:
    """The largest error that passes where eager's own is `eager_error`."""
    return 2 * eager_error + 8 * torch.finfo(dtype).eps
