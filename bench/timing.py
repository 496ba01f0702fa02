"""Times of one run after another, each with a cold L2 cache."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusedres.timing import seconds

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU this runs on


def flushed_seconds(run: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """`rounds` times of `run`, each after 2 calls to warm up in all and with a cold L2 cache."""
    for _ in range(2):
        run()
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    found = []
    for _ in range(rounds):
        flush.zero_()
        found.append(seconds(run, device))
    return found
