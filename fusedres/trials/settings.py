"""Whether calls may be measured now: the only place that reads FUSEDRES_TRIAL.

FUSEDRES_TRIAL=0    no call is ever measured: the tables decide, those of this package and the user's
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

ENVIRONMENT_VARIABLE = "FUSEDRES_TRIAL"

_off: ContextVar[bool] = ContextVar("fusedres_trials_off", default=False)


@contextmanager
def off() -> Iterator[None]:
    """Within the context, in this thread, no call is measured."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def is_on(device: torch.device) -> bool:
    """Not where results must be the same bit by bit from run to run, and not while a CUDA graph is captured."""
    if _off.get() or os.environ.get(ENVIRONMENT_VARIABLE) == "0":
        return False
    if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
