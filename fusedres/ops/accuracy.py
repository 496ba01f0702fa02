"""The one rule of accuracy: error against float64, judged by the error of eager PyTorch itself.

    err = ||actual - exact||_2 / ||exact||_2       pass: err <= 2*err(eager) + slack(dtype)*eps(dtype)

The eager result comes from the same layout, dtype and thread count as the one under test. Where a norm goes over few
rounding errors, its own error is that of several draws, see `tests/support/block_accuracy.py`.

slack is 8 in float32 and float64. In bfloat16 and float16 that would be twenty times the error of a convolution, which
is a few roundings to 16 bits in eager as anywhere. There it is what eager needs to pass against itself in the other
layout and with other threads, on every raw op and form of block, over seeds, rounded up to a power of two:
`bench/accuracy_slack.py` finds it, `bench/results/cpu/accuracy_slack.json` has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = {torch.bfloat16: 1 / 4, torch.float16: 1 / 4}  # of eps
WIDE_SLACK = 8.0  # of eps, in the dtypes that are not there


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
    """The largest error that passes where eager's own is `eager_error`.

    Args:
        dtype: of the result, or of the activations that it was computed from if that is coarser.
    """
    return 2 * eager_error + SLACK.get(dtype, WIDE_SLACK) * torch.finfo(dtype).eps
