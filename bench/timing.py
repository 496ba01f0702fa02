"""Times of one run after another, each with a cold L2 cache."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusedres.measuring.timing import seconds

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU this runs on
SPIN_CYCLES = 1_000_000  # about half a millisecond, in which the host enqueues what is timed


def flushed_seconds(run: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """`rounds` times of `run`, each after 2 calls to warm up in all and with a cold L2 cache.

    On a GPU without what the host takes to enqueue it: the device spins meanwhile, and leaves its caches alone.
    """
    for _ in range(2):
        run()
    if device.type != "cuda":
        return [seconds(run, device) for _ in range(rounds)]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    found = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(SPIN_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return found
