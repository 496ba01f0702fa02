"""Times a patched model against the unpatched one, on the user's own input, once it is known to compute the same."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.blocks import RECIPES
from fusedres.blocks.choice import AUTO
from fusedres.dispatch import AUTO as AUTO_BACKEND
from fusedres.errors import VerificationError
from fusedres.patching.api import check_model, patch, report, unpatch
from fusedres.patching.verify import VerifyReport, tensors, verify
from fusedres.timing import bootstrap_interval, interleave, median, paired_ratios

ROUNDS = 15
VERBS = {"training": "trains", "inference": "infers"}


@dataclass(frozen=True)
class PhaseComparison:
    """One phase: a training step without the optimiser, or inference.

    ratio: how many times as fast the patched model is, the median over paired rounds; low, high: its 95 % interval
    (bootstrap). runs_as: how many blocks ran as which recipe.
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
    def clause(self) -> str:
        shown = f"{self.ratio:.2f}x as fast [{self.low:.2f} {self.high:.2f}]"
        verb = VERBS[self.phase]
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
        found = "patched " + " and ".join(phase.clause for phase in self.phases)
        slower = [phase.phase for phase in self.phases if phase.high < 1]
        if self.checks is None:
            return f"{found}: no block runs fused"
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
                f"[{p.low:.2f} {p.high:.2f}]  {runs_as}"
            )
        return "\n".join([*lines, self.sentence])


def compare(
    model: nn.Module,
    example: Any,
    *,
    recipe: str = AUTO,
    backend: str = AUTO_BACKEND,
    rounds: int = ROUNDS,
) -> Comparison:
    """Times copies of the model, patched and unpatched, in turns, in a training step and in inference.

    First `verify` compares every recipe that runs with the unpatched model.

    Args:
        model: patched or not; it is left alone. Dtype, device and memory format are measured as they are.
        example: an input tensor, or a tuple of positional arguments, of the batch size that matters.
        recipe, backend: as for `fusedres.patch`.
        rounds: timed steps of each, at least 2.

    Returns:
        The comparison; times in seconds. A model whose output needs no gradient has no training step.

    Raises:
        ValueError: rounds below 2, or an unknown recipe.
        VerificationError: the patched model computes something else.
        TypeError, UnsupportedModelError, BackendUnavailableError: as `fusedres.patch`.
    """
    check_model(model, "compare")
    if rounds < 2:
        raise ValueError(f"fusedres.compare: an interval needs at least 2 rounds, found {rounds}")
    example = example if isinstance(example, tuple) else (example,)
    plain = unpatch(copy.deepcopy(model))
    fused = patch(copy.deepcopy(plain), recipe=recipe, backend=backend)
    device = next((a.device for a in example if isinstance(a, Tensor)), torch.device("cpu"))
    checks = gate(plain, fused, example, backend)
    phases = []
    for phase, steps_of in (("training", training_step), ("inference", inference)):
        steps = [steps_of(m, example) for m in (plain, fused)]
        if steps[0] is None or steps[1] is None:
            continue
        unpatched, patched = interleave(steps[0], steps[1], device, rounds)
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


def gate(plain: nn.Module, fused: nn.Module, example: tuple[Any, ...], backend: str) -> VerifyReport | None:
    """Raises VerificationError if a recipe that runs in the patched model computes something else."""
    ran: set[str] = set()
    for training in (True, False):
        with torch.set_grad_enabled(training):
            trial = copy.deepcopy(fused).train(training)
            trial(*example)
        ran |= set(runs_as(trial)) & set(RECIPES)
    if not ran:
        return None
    checks = verify(plain, example, recipes=tuple(sorted(ran)), backend=backend)
    if not checks:
        raise VerificationError(
            f"fusedres.compare: the patched model computes something else than the unpatched one, so speed means "
            f"nothing; please report this:\n{checks}"
        )
    return checks


def training_step(model: nn.Module, example: tuple[Any, ...]) -> Callable[[], None] | None:
    """Forward and backward in training mode, for fixed gradients of the outputs; None if no output needs one."""

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
