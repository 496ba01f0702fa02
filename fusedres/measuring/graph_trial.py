"""Which recipe a CUDA graph of a model holds, where no table names one: measured on replays of the whole model.

Inside of a graph a call costs the host nothing, so that what a trial found in eager steps says little. Each way to run
is captured, replayed and given back, one after the other: there is never memory for more than one graph. What was found
is kept in the user's table, by the kinds of all blocks together, under the mode "cuda graph".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fusedres.blocks import user_table
from fusedres.blocks.choice import UNFUSED
from fusedres.blocks.user_table import Key
from fusedres.measuring.cuda_graphs import CudaGraphs
from fusedres.measuring.timing import median, seconds
from fusedres.modules.derived_class import STATE
from fusedres.patching.api import patched_blocks
from fusedres.trials import registry, settings
from fusedres.trials.on_block import OnBlock
from fusedres.trials.trial import NEEDED, Ratio

REPLAYS = 12  # timed, of each way; the first two do not count
Make = Callable[[], CudaGraphs]


def trials_of(model: nn.Module) -> list[OnBlock]:
    """Of the blocks whose newest call no table names a recipe for."""
    found = [vars(block)[STATE].on_trial for _, block in patched_blocks(model)]
    return [trial for trial in found if trial.latest is not None]


@contextmanager
def forced(trials: list[OnBlock], way: str) -> Iterator[None]:
    """Within the context those blocks run that way, in every call."""
    for trial in trials:
        trial.forced = way
    try:
        yield
    finally:
        for trial in trials:
            trial.forced = None


def key_of(trials: list[OnBlock]) -> Key:
    """What the verdict on a graph of these blocks is kept by."""
    keys = [trial.latest.key for trial in trials if trial.latest is not None]
    return user_table.key_of_all(keys, "in a graph", user_table.CUDA_GRAPH)


def captured(make: Make) -> CudaGraphs:
    graphs = make()
    graphs.warm_up()
    graphs.capture()
    return graphs


def replayed(graphs: CudaGraphs) -> float:
    """Median seconds of a replay, backward included where there is one."""

    def step() -> None:
        with torch.no_grad():
            graphs.replay(graphs.inputs)
            if graphs.differentiable:
                ones = [None if i not in graphs.differentiable else t for i, t in enumerate(graphs.outputs)]
                graphs.replay_backward(graphs.turn, ones)

    return median([seconds(step, graphs.device) for _ in range(REPLAYS)][2:])


def fastest(model: nn.Module, make: Make, device: torch.device) -> str | None:
    """The way to run that a graph of the model should hold; None where tables decide, or nothing may be measured.

    Args:
        make: the graphs of the model, not captured yet; it ran once, outside of a capture, in the same mode.
    """
    trials = trials_of(model)
    if not trials:
        return None
    key = key_of(trials)
    known = user_table.table().get(key)
    if known is not None:
        return known.recipe
    recipes = sorted({recipe for trial in trials for recipe in trial.candidates})
    if not recipes or not settings.is_on(device):  # without a recipe: no kernel could be proved
        return None
    times: dict[str, list[float]] = {}
    for way in (UNFUSED, *recipes, UNFUSED):  # once more last: clocks may have changed meanwhile
        try:
            with forced(trials, way):
                taken = replayed(captured(make))
        except torch.OutOfMemoryError:
            if way == UNFUSED:
                raise
        else:
            times.setdefault(way, []).append(taken)
    ratios = {way: min(times[UNFUSED]) / min(found) for way, found in times.items() if way != UNFUSED}
    best = max(ratios, key=lambda way: ratios[way], default=UNFUSED)
    ratio = ratios.get(best, 1.0)
    found = best if ratio >= NEEDED else UNFUSED
    registry.keep(key, found, Ratio(ratio, ratio, ratio))
    return found


def capture_fastest(model: nn.Module, make: Make, device: torch.device) -> CudaGraphs:
    """The model's graphs, captured. Raises as `CudaGraphs.capture`.

    Args:
        make: as for `fastest`.
    """
    way = fastest(model, make, device)
    if way is None:
        return captured(make)
    with forced(trials_of(model), way):
        return captured(make)
