"""How the benchmarks take times: with a cold L2 cache, or two implementations in turns. Clocks: `fusedres.timing`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusedres.timing import bootstrap_interval, median, paired_ratios, seconds, synchronize

__all__ = [
    "bootstrap_interval",
    "comparison",
    "flushed_seconds",
    "interleave",
    "median",
    "paired_ratios",
    "seconds",
    "summary",
    "synchronize",
]

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


def interleave(
    baseline: Callable[[], object], target: Callable[[], object], device: torch.device, rounds: int
) -> tuple[list[float], list[float]]:
    """Times of both, taken in turns after two calls each to warm up."""
    for run in (baseline, target) * 2:
        run()
    pairs = [(seconds(baseline, device), seconds(target, device)) for _ in range(rounds)]
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)


def summary(times: list[float]) -> dict[str, float]:
    """What a report keeps of a list of seconds."""
    return {"seconds": median(times), "fastest": min(times), "slowest": max(times), "rounds": len(times)}


def comparison(baseline: list[float], target: list[float]) -> dict[str, object]:
    """Medians and the paired ratio of interleaved rounds; above 1 the target is faster."""
    ratios = paired_ratios(baseline, target)
    low, high = bootstrap_interval(ratios)
    return {
        **summary(target),
        "baseline_seconds": median(baseline),
        "ratio": median(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }
