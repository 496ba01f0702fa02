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


def off_because() -> str | None:
    """What switches trials off for the whole process now; None: they are on."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0":
        return f"{ENVIRONMENT_VARIABLE}=0"
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms"
    return "torch.backends.cudnn.deterministic" if torch.backends.cudnn.deterministic else None


def is_on(device: torch.device) -> bool:
    """Not where results must be the same bit by bit from run to run, and not while a CUDA graph is captured."""
    if _off.get() or off_because() is not None:
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
