"""Cells that time whole steps of a workload under an implementation, interleaved with eager channels_last."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from functools import partial
from itertools import product
from typing import Any

import torch
from report import Cell, Settings
from torch.profiler import ProfilerActivity, profile
from workloads import BASELINE, CorrectnessGate, Step, Workload, build, needs_graph

from fusedres.measuring.timing import comparison, interleave

ROUNDS = 30
SMALL_ROUNDS = 2
KEPT_KERNELS = 40

gate = CorrectnessGate()


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """Most memory that one step holds, with the weights and whatever else is alive; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step.run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def time_step(settings: Settings, workload: Workload, implementation: str) -> dict[str, Any]:
    """Medians of interleaved rounds, the paired ratio to the baseline, images a second, peak memory."""
    release(settings.device)
    step = build(workload, implementation, settings.backend)
    for _ in range(3):
        step.run()
    peak = peak_bytes(step, settings.device)
    gate.check(workload, step, implementation)
    baseline = build(workload, BASELINE)
    rounds = ROUNDS if settings.full else SMALL_ROUNDS
    found = comparison(*interleave(baseline.run, step.run, settings.device, rounds))
    found["images_per_second"] = workload.batch / float(found["seconds"])  # type: ignore[arg-type]
    return {**found, "peak_bytes": peak, "runs_as": step.runs_as()}


def profile_step(settings: Settings, workload: Workload, implementation: str) -> dict[str, Any]:
    """Kernels of one step by name: calls and microseconds, the longest first."""
    step = build(workload, implementation, settings.backend)
    for _ in range(3):
        step.run()
    on_gpu = settings.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step.run()
        if on_gpu:
            torch.cuda.synchronize(settings.device)
    kernels = {}
    for event in profiler.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own > 0 and (not on_gpu or event.device_type.name == "CUDA"):
            kernels[event.key] = {"calls": event.count, "microseconds": own}
    longest = sorted(kernels.items(), key=lambda item: -item[1]["microseconds"])[:KEPT_KERNELS]
    total = sum(k["microseconds"] for k in kernels.values())
    return {
        "launches": sum(k["calls"] for k in kernels.values()),
        "microseconds": total,
        "kernels": dict(longest),
    }


def step_cells(
    settings: Settings, workloads: Iterable[Workload], implementations: Iterable[str]
) -> list[Cell]:
    """Every workload under every implementation, workload by workload."""
    found = []
    for workload, name in product(workloads, implementations):
        needs = ("cuda",) if needs_graph(name) else ()
        found.append(Cell(f"{workload.name}/{name}", partial(time_step, settings, workload, name), needs))
    return found
