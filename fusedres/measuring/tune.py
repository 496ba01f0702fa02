"""tune: measures, block by block, which recipe is fastest on this machine. Offline and explicit: nothing calls it.

Each class of block is measured once, alone, on random input of the shape it has in the model: the original forward
and every recipe in turns, round by round, after its output has passed the rule of accuracy. What counts is the whole
step, backward included where gradients are wanted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.blocks import RECIPES, user_table
from fusedres.blocks.choice import AUTO, UNFUSED
from fusedres.blocks.user_table import Entry, Key
from fusedres.errors import UnsupportedModelError
from fusedres.measuring.progress import Progress, untold
from fusedres.measuring.timing import bootstrap_interval, median, paired_ratios, seconds
from fusedres.measuring.verify import error
from fusedres.modules.lazy import initialised_copy
from fusedres.ops.accuracy import error_limit
from fusedres.ops.dispatch import AUTO as AUTO_BACKEND
from fusedres.patching.api import check_model, find, patch, report, unpatch
from fusedres.trials import settings

# n rounds all favour one side by chance with probability 2**-n: below 0.05 from 5 on, so fewer have no interval that
# says whether a recipe is faster
LEAST_ROUNDS = 5
GATE_BATCH = 8  # images that the output is held against float64 on


@dataclass(frozen=True)
class Timing:
    """One recipe's median time, and how many times as fast as the original forward: median and 95 % interval."""

    recipe: str
    seconds: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Tuned:
    """One class of block: which blocks have it, what was measured, and the entry that follows.

    rejected: recipes that were not measured, and why.
    """

    key: Key
    blocks: tuple[str, ...]
    timings: tuple[Timing, ...]
    rejected: dict[str, str]

    @property
    def entry(self) -> Entry:
        """The fastest recipe; the original forward unless another one is faster beyond doubt."""
        faster = [t for t in self.timings if t.low >= 1]
        best = max(faster, key=lambda t: t.ratio, default=None)
        return Entry(UNFUSED, 1.0) if best is None else Entry(best.recipe, round(best.ratio, 4))


@dataclass(frozen=True)
class Place:
    """A block in the model, taken out of it: call `module.<method>` on tensors like x."""

    name: str
    module: nn.Module
    method: str
    x: Tensor  # [N, C, H, W]
    is_stem: bool  # its input is an image, which wants no gradient

    def variant(self, recipe: str, backend: str) -> nn.Module:
        """A copy that runs as that recipe."""
        made = copy.deepcopy(self.module)
        if recipe == UNFUSED:
            return made
        # a stem's module is the whole model: its blocks are left alone
        return patch(made, recipe=recipe, backend=backend, include=("", "stem"))

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        return getattr(module, self.method)(x)


@contextmanager
def recorded_inputs(places: list[tuple[nn.Module, str]]) -> Iterator[dict[int, Tensor]]:
    """Within the context, what each module's method is called with, by the module's identity."""
    inputs: dict[int, Tensor] = {}

    def recording(module: nn.Module, original: Callable[..., Any], x: Tensor) -> Any:
        inputs[id(module)] = torch.empty_like(x)
        return original(x)

    for module, method in places:
        vars(module)[method] = partial(recording, module, getattr(module, method))
    try:
        yield inputs
    finally:
        for module, method in places:
            del vars(module)[method]


def find_places(model: nn.Module, example: tuple[Any, ...]) -> list[Place]:
    """Every block of the model that a recipe can run, with random input like the one it has on the example."""
    plain = unpatch(initialised_copy(model, example))
    found = [f for f in find(plain) if f.plan is not None]
    if not found:
        raise UnsupportedModelError(
            f"fusedres tune: no residual block of {type(model).__name__} can be patched; see fusedres.report(model)."
        )
    with torch.no_grad(), recorded_inputs([(f.module, f.plan.method) for f in found if f.plan]) as inputs:
        plain(*example)
    return [
        Place(f.name, f.module, f.plan.method, inputs[id(f.module)].normal_(), f.plan.is_stem)
        for f in found
        if f.plan is not None and id(f.module) in inputs
    ]


def step_of(place: Place, module: nn.Module, gradients: bool) -> Callable[[], Tensor]:
    """One forward, and one backward if gradients are wanted; returns the output."""
    x = place.x.detach().requires_grad_(gradients and not place.is_stem)
    with torch.no_grad():
        dy = torch.randn_like(place.call(copy.deepcopy(module), x))

    def step() -> Tensor:
        with torch.set_grad_enabled(gradients):
            y = place.call(module, x)
        if gradients:
            module.zero_grad()
            x.grad = None
            y.backward(dy)
        return y.detach()

    return step


def inaccurate(place: Place, module: nn.Module, gradients: bool) -> str | None:
    """Why this variant must not be taken, or None.

    Its output must pass the rule of `fusedres.ops.accuracy`, its gradients must be finite. How accurate those are, the
    tests say: against float64 they are dominated by the few signs near zero that rounding flips.
    """
    small = replace(place, x=place.x[:GATE_BATCH])
    eager = step_of(small, copy.deepcopy(place.module), False)()
    with torch.autocast(small.x.device.type, enabled=False), torch.no_grad():
        exact = place.call(copy.deepcopy(place.module).double(), small.x.double())
    candidate = copy.deepcopy(module)
    found = step_of(small, candidate, gradients)()
    value, own = error([found], [exact]), error([eager], [exact])
    if not value <= error_limit(own, found.dtype):
        return f"error {value:.1e} where eager has {own:.1e}"
    grads = [p.grad for p in candidate.parameters() if p.grad is not None]
    return None if all(g.isfinite().all() for g in grads) else "a gradient is not finite"


def key_of(place: Place, backend: str, gradients: bool) -> Key | None:
    """What a patched block looks up for this call; None where its guards refuse the call."""
    with user_table.recorded_keys() as keys, settings.off():
        step_of(place, place.variant(AUTO, backend), gradients)()
    return keys[-1] if keys else None


def measure(
    place: Place, backend: str, gradients: bool, rounds: int, after_round: Callable[[int], object]
) -> tuple[tuple[Timing, ...], dict[str, str]]:
    """Times of every recipe that passes, and the reasons of those that do not."""
    steps, rejected = {}, {}
    for recipe in RECIPES:
        module = place.variant(recipe, backend)
        reason = inaccurate(place, module, gradients)
        step = step_of(place, module, gradients)
        step()
        (row,) = report(module).matched
        if row.runs_as != recipe:
            rejected[recipe] = row.code or f"runs as {row.runs_as}"
        elif reason is not None:
            rejected[recipe] = reason
        else:
            steps[recipe] = step
    steps[UNFUSED] = step_of(place, place.variant(UNFUSED, backend), gradients)
    times: dict[str, list[float]] = {recipe: [] for recipe in steps}
    for turn in range(-2, rounds):  # two to warm up
        for recipe, step in steps.items():
            elapsed = seconds(step, place.x.device)
            if turn >= 0:
                times[recipe].append(elapsed)
        after_round(max(turn + 1, 0))
    timings = []
    for recipe in steps:
        ratios = paired_ratios(times[UNFUSED], times[recipe])
        timings.append(Timing(recipe, median(times[recipe]), median(ratios), *bootstrap_interval(ratios)))
    return tuple(timings), rejected


def tune(
    model: nn.Module,
    example: Any,
    *,
    gradients: bool = True,
    backend: str = AUTO_BACKEND,
    rounds: int = 9,
    progress: Progress = untold,
) -> list[Tuned]:
    """Measures every class of block of a model; `fusedres.blocks.user_table.write` keeps the result.

    The model's mode and the caller's autocast are those measured. Takes minutes; give it a machine to itself.

    Args:
        model: patched or not; it is left alone.
        example: an input tensor, or a tuple of positional arguments: it sets batch, size, dtype and device.
        gradients: whether a backward belongs to the step.
        backend: as for `fusedres.patch`.
        rounds: interleaved rounds of each class, at least LEAST_ROUNDS.
        progress: called between rounds with the block that is measured, how many rounds are over, out of how many.

    Raises:
        ValueError: too few rounds.
        TypeError, UnsupportedModelError: as `fusedres.patch`.
    """
    check_model(model, "tune")
    if rounds < LEAST_ROUNDS:
        raise ValueError(
            f"fusedres tune: found {rounds} rounds, needed at least {LEAST_ROUNDS}: in fewer one recipe can be ahead "
            "in every round by chance alone, so the 95 % interval that decides needs them; more rounds narrow it"
        )
    places = find_places(model, example if isinstance(example, tuple) else (example,))
    classes: dict[Key, list[Place]] = {}
    for place in places:
        key = key_of(place, backend, gradients)
        if key is not None:
            classes.setdefault(key, []).append(place)
    found: list[Tuned] = []
    total = len(classes) * rounds

    def told(name: str, before: int, turn: int) -> None:
        progress(f"measuring {name}", before + turn, total)

    for key, members in classes.items():
        after_round = partial(told, members[0].name, len(found) * rounds)
        after_round(0)
        timings, rejected = measure(members[0], backend, gradients, rounds, after_round)
        found.append(Tuned(key, tuple(m.name for m in members), timings, rejected))
    return found
