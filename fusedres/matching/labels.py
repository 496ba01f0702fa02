"""Whether a module labels parts of itself for profilers: profiles of the fused block would lack them.

Labels leave no trace in what a module computes. They are read from a profiler that watches dry runs: what it was told
that is no operator of torch is a label. NVTX and ITT ranges pass by it, through a module of torch's each, which is
watched.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock, get_ident
from typing import Any

import torch
from torch.autograd import profiler
from torch.cuda import nvtx
from torch.profiler import itt

from fusedres.matching.dry_run import DryRunError, StandIn
from fusedres.matching.every_path import FIRST
from fusedres.matching.trace import trace

RANGES = (
    (nvtx, "_nvtx"),
    (itt, "_itt"),
)  # torch's modules of ranges, and what each of them calls by this name
SWAPPING = Lock()


class Watched:
    """A module that notes what it is asked for in the thread that made this."""

    def __init__(self, module: Any) -> None:
        self.module, self.thread, self.asked = module, get_ident(), False

    def __getattr__(self, name: str) -> Any:
        if get_ident() == self.thread:
            self.asked = True
        return getattr(self.module, name)


@contextmanager
def watched_ranges() -> Iterator[list[Watched]]:
    """Within it, torch's functions for ranges go through what is yielded, and torch says that it is profiling: some
    ask for that before they label."""
    with SWAPPING:
        found = [Watched(getattr(module, name)) for module, name in RANGES]
        enabled = profiler._is_profiler_enabled
        try:
            profiler._is_profiler_enabled = True
            for (module, name), watched in zip(RANGES, found, strict=True):
                setattr(module, name, watched)
            yield found
        finally:
            profiler._is_profiler_enabled = enabled
            for (module, name), watched in zip(RANGES, found, strict=True):
                setattr(module, name, watched.module)


@cache
def is_operator(name: str) -> bool:
    return "::" in name and bool(torch._C._jit_get_schemas_for_operator(name))


def profiled_labels(stand_in: StandIn, channels: int) -> bool:
    """Whether a run in either mode tells the profiler of anything but operators. In a thread without a profiler."""
    config = torch.autograd.ProfilerConfig(
        torch.autograd.ProfilerState.CPU,
        *(False,) * 5,  # report_input_shapes, profile_memory, with_stack, with_flops, with_modules
        torch._C._profiler._ExperimentalConfig(),
    )
    n, height, width = FIRST
    torch.autograd._enable_profiler_legacy(config)
    try:
        for training in (True, False):
            trace(stand_in, (n, channels, height, width), training, opaque=set(), called=set())
    finally:
        threads = torch.autograd._disable_profiler_legacy()
    names = {event.name() for events in threads for event in events if event.kind() == "push"}
    return not all(map(is_operator, names))


def check_no_labels(stand_in: StandIn, channels: int) -> None:
    """Raises DryRunError if the module labels parts of itself, by record_function or as NVTX or ITT ranges."""

    def run() -> bool:
        with watched_ranges() as ranges:
            return profiled_labels(stand_in, channels) or any(watched.asked for watched in ranges)

    with ThreadPoolExecutor(1) as own:  # the caller's thread may have a profiler, and takes no second one
        if own.submit(run).result():
            raise DryRunError("profiler_label")
