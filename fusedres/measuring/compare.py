"""Times a patched model against the unpatched one, on the user's own input, once it is known to compute the same."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fusedres.blocks import RECIPES
from fusedres.blocks.choice import AUTO
from fusedres.errors import VerificationError
from fusedres.measuring.compile_ahead import compile_step
from fusedres.measuring.progress import Progress, untold
from fusedres.measuring.timing import bootstrap_interval, interleave, median, paired_ratios
from fusedres.measuring.verify import VerifyReport, check_blocks, tensors, verify
from fusedres.measuring.warmup import cuda_devices, settle
from fusedres.modules.lazy import initialised_copy
from fusedres.ops.dispatch import AUTO as AUTO_BACKEND
from fusedres.patching.api import patch, report, unpatch

ROUNDS = 15
# n rounds all lie on one side of the median with probability 2 * 2**-n: below 0.05 from 6 on, so fewer have no interval
DECISIVE_ROUNDS = 6
VERBS = {"training": "trains", "inference": "infers"}


@dataclass(frozen=True)
class PhaseComparison:
    """One phase: a training step without the optimiser, or inference.

    ratio: how many times as fast the patched model is, the median over paired rounds; low, high: its 95 % interval
    (bootstrap), where there are DECISIVE_ROUNDS. runs_as: how many blocks ran as which recipe.
    """

    phase: str
    unpatched_seconds: float
    patched_seconds: float
    ratio: float
    low: float
    high: float
    rounds: int
    runs_as: dict[str, int]

    @property
    def fused(self) -> bool:
        """Whether any block ran fused."""
        return any(recipe in RECIPES for recipe in self.runs_as)

    @property
    def is_slower(self) -> bool:
        return self.fused and self.rounds >= DECISIVE_ROUNDS and self.high < 1

    @property
    def interval(self) -> str:
        return f"[{self.low:.2f} {self.high:.2f}]" if self.rounds >= DECISIVE_ROUNDS else "-"

    @property
    def clause(self) -> str:
        verb = VERBS[self.phase]
        if not self.fused:
            return f"{verb} as unpatched, for no block runs fused there"
        if self.rounds < DECISIVE_ROUNDS:
            few = f"in {self.rounds} rounds, too few to tell from noise (needed {DECISIVE_ROUNDS})"
            return f"{verb} {self.ratio:.2f}x as fast {few}"
        shown = f"{self.ratio:.2f}x as fast {self.interval}"
        if self.low > 1:
            return f"{verb} {shown}"
        return f"{verb} slower, {shown}" if self.high < 1 else f"{verb} no faster within the noise, {shown}"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `print(comparison)` shows a table and says the outcome in its last line."""

    phases: tuple[PhaseComparison, ...]
    checks: VerifyReport | None  # of the recipes that ran; None where none did

    @property
    def sentence(self) -> str:
        """The outcome in plain words."""
        if not any(phase.fused for phase in self.phases):
            return "no block runs fused"
        found = "patched " + " and ".join(phase.clause for phase in self.phases)
        slower = [phase.phase for phase in self.phases if phase.is_slower]
        return f"{found}: leave it unpatched for {' and '.join(slower)}" if slower else found

    def as_dict(self) -> dict[str, Any]:
        return {
            "phases": [asdict(phase) for phase in self.phases],
            "checks": None if self.checks is None else self.checks.as_dict(),
            "sentence": self.sentence,
        }

    def __str__(self) -> str:
        lines = [f"{'phase':9}  {'unpatched ms':>12}  {'patched ms':>10}  {'ratio':>5}  {'95 %':11}  runs as"]
        for p in self.phases:
            runs_as = ", ".join(f"{recipe}: {count}" for recipe, count in p.runs_as.items())
            lines.append(
                f"{p.phase:9}  {p.unpatched_seconds * 1e3:12.2f}  {p.patched_seconds * 1e3:10.2f}  {p.ratio:5.2f}  "
                f"{p.interval:11}  {runs_as}"
            )
        return "\n".join([*lines, self.sentence])


def compare(
    model: nn.Module,
    example: Any,
    *,
    recipe: str = AUTO,
    backend: str = AUTO_BACKEND,
    rounds: int = ROUNDS,
    check_with: Any = None,
    progress: Progress = untold,
) -> Comparison:
    """Times copies of the model, patched and unpatched, in turns, in a training step and in inference.

    First recipes that are on trial get their verdicts, and `verify` compares every one that runs with the unpatched
    model.

    Args:
        model: patched or not; it is left alone. Dtype, device and memory format are measured as they are.
        example: an input tensor, or a tuple of positional arguments, of the batch size that matters.
        recipe: as for `fusedres.patch`.
        backend: as for `fusedres.patch`.
        rounds: timed steps of each, at least 2; fewer than 6 give ratios without intervals.
        check_with: what `verify` is given in place of the example, such as fewer images: its float64 runs take longer
            and more memory than a step.
        progress: called between steps with what is done now, how many steps of that are over, and out of how many.

    Returns:
        The comparison; times in seconds. A model whose output needs no gradient has no training step.

    Raises:
        ValueError: rounds below 2, or an unknown recipe.
        VerificationError: the patched model computes something else.
        TypeError, UnsupportedModelError, BackendUnavailableError: as `fusedres.patch`.
    """
    check_blocks(model, "compare")
    if rounds < 2:
        raise ValueError(f"fusedres.compare: an interval needs at least 2 rounds, found {rounds}")
    example, check_with = (
        e if isinstance(e, tuple) else (e,) for e in (example, example if check_with is None else check_with)
    )
    plain = unpatch(initialised_copy(model, example))
    fused = patch(copy.deepcopy(plain), recipe=recipe, backend=backend)
    device = next((a.device for a in example if isinstance(a, Tensor)), torch.device("cpu"))
    computed_with = [t for t in tree_leaves((example, list(plain.parameters()))) if isinstance(t, Tensor)]
    devices = cuda_devices(computed_with)
    phases = []

    def step_of_each() -> None:
        for steps_of in (training_step, inference):
            if (step := steps_of(fused, example)) is not None:
                step()

    with torch.random.fork_rng(devices=devices):
        compile_step(fused, step_of_each, computed_with, progress, alone=True)
        steps = {
            phase: (of_plain, of_fused)
            for phase, steps_of in (("training", training_step), ("inference", inference))
            if (of_plain := steps_of(plain, example)) and (of_fused := steps_of(fused, example))
        }
        for phase, (_, step) in steps.items():
            settle(fused, step, partial(progress, f"trying recipes in {phase}"))
        checks = gate(plain, fused, example, check_with, backend, progress)
        for phase, pair in steps.items():
            told = partial(progress, f"timing {phase}")
            told(0, rounds)
            unpatched, patched = interleave(*pair, device, rounds, after_round=told)
            phases.append(summarise(phase, unpatched, patched, runs_as(fused)))
    return Comparison(tuple(phases), checks)


def summarise(
    phase: str, unpatched: list[float], patched: list[float], recipes: dict[str, int]
) -> PhaseComparison:
    """The comparison of a phase from its times in seconds, round by round."""
    ratios = paired_ratios(unpatched, patched)
    low, high = bootstrap_interval(ratios)
    medians = (median(unpatched), median(patched), median(ratios))
    return PhaseComparison(phase, *medians, low, high, len(ratios), recipes)


def runs_as(model: nn.Module) -> dict[str, int]:
    return dict(Counter(block.runs_as or "not called" for block in report(model).matched))


def gate(
    plain: nn.Module,
    fused: nn.Module,
    example: tuple[Any, ...],
    check_with: tuple[Any, ...],
    backend: str,
    progress: Progress,
) -> VerifyReport | None:
    """Raises VerificationError if a recipe that the example runs by computes something else of `check_with`."""
    ran: set[str] = set()
    for training in (True, False):
        with torch.set_grad_enabled(training):
            trial = copy.deepcopy(fused).train(training)
            trial(*example)
        ran |= set(runs_as(trial)) & set(RECIPES)
    if not ran:
        return None
    checks = verify(plain, check_with, recipes=tuple(sorted(ran)), backend=backend, progress=progress)
    if not checks:
        raise VerificationError(
            f"fusedres.compare: the patched model computes something else than the unpatched one, so speed means "
            f"nothing; please report this:\n{checks}"
        )
    return checks


def training_step(model: nn.Module, example: tuple[Any, ...]) -> Callable[[], None] | None:
    """Forward and backward in training mode, for fixed gradients of the outputs; None if no output needs one."""

    @torch.enable_grad()
    def outputs() -> list[Tensor]:
        return [out for out in tensors(model.train()(*example)) if out.requires_grad]

    gradients = [torch.ones_like(out) for out in outputs()]
    if not gradients:
        return None

    def step() -> None:
        model.zero_grad()
        torch.autograd.backward(outputs(), gradients)

    return step


def inference(model: nn.Module, example: tuple[Any, ...]) -> Callable[[], None] | None:
    """Forward in evaluation mode, without gradients."""

    @torch.no_grad()
    def step() -> None:
        model.eval()(*example)

    return step
