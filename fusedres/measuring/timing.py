"""Clocks and statistics: CUDA events or the host's clock, medians, and the bootstrap interval of a ratio."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

RESAMPLES = 10_000


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call: by events on the device's stream, or by the host's clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleave(
    baseline: Callable[[], object],
    target: Callable[[], object],
    device: torch.device,
    rounds: int,
    before: Callable[[], object] | None = None,
    after_round: Callable[[int, int], object] | None = None,
) -> tuple[list[float], list[float]]:
    """Times of both, in rounds, after two calls each to warm up. Who goes first alternates, so that it favours neither.

    Args:
        before: called ahead of each call that is timed.
        after_round: called after each round with how many are over, out of how many.
    """
    for run in (baseline, target) * 2:
        run()
    first: list[float] = []
    second: list[float] = []
    sides = (baseline, first), (target, second)
    for turn in range(rounds):
        for run, times in sides if turn % 2 == 0 else reversed(sides):
            if before is not None:
                before()
            times.append(seconds(run, device))
        if after_round is not None:
            after_round(turn + 1, rounds)
    return first, second


def median(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


def summary(times: list[float]) -> dict[str, float]:
    """What a report keeps of a list of seconds."""
    return {"seconds": median(times), "fastest": min(times), "slowest": max(times), "rounds": len(times)}


def paired_ratios(baseline: list[float], target: list[float]) -> list[float]:
    """How many times faster the target was, round by round. Both lists in the order of the rounds."""
    assert len(baseline) == len(target) > 0, f"{len(baseline)} baseline and {len(target)} target rounds"
    return [b / t for b, t in zip(baseline, target, strict=True)]


def bootstrap_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Percentile-bootstrap interval of the median (Efron 1979), from a fixed seed."""
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    medians = data[picks].quantile(0.5, dim=1)
    tail = (1 - confidence) / 2
    return medians.quantile(tail).item(), medians.quantile(1 - tail).item()


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
