"""Holds a patched model against the unpatched one: outputs, gradients, running statistics, on the user's own input.

Whole models are compared in float64, to 1e-10, in training and evaluation mode; in the model's own dtype only
outputs are, by their error against float64 relative to the unpatched model's own (sign flips of a ReLU near zero
would drown everything else in lower precision). Dtype, memory layout and device have to be the same in both, under
the caller's autocast, grad mode and default dtype.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.blocks import RECIPES
from fusedres.errors import UnsupportedModelError
from fusedres.measuring.progress import Progress, untold
from fusedres.modules.lazy import initialised_copy
from fusedres.ops.accuracy import error_limit
from fusedres.ops.dispatch import AUTO as AUTO_BACKEND
from fusedres.patching.api import check_model, find, patch, report, unpatch
from fusedres.patching.report import PatchReport

FLOAT64_LIMIT = 1e-10
MODES = {True: "training", False: "evaluation"}  # by nn.Module.training
SEED = 0


@dataclass(frozen=True)
class Check:
    """One comparison: the largest relative error found, or a number of differing tensors, and the limit for it."""

    what: str
    recipe: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


@dataclass(frozen=True)
class VerifyReport:
    """Every comparison. True if all passed and some block ran fused.

    fused_blocks: by the recipe asked for, how many blocks ran fused. reasons: by the code of the reason, how many
    blocks did not run as asked, under any recipe.
    """

    checks: tuple[Check, ...]
    fused_blocks: dict[str, int]
    reasons: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return all(check.passed for check in self.checks) and not self.nothing_ran_fused

    @property
    def nothing_ran_fused(self) -> bool:
        """Whether the unpatched model was held against itself alone."""
        return not any(self.fused_blocks.values())

    @property
    def sentence(self) -> str:
        """The outcome in plain words."""
        if any(not check.passed for check in self.checks):
            return "the patched model computes something else than the unpatched one"
        if self.nothing_ran_fused:
            counted = ", ".join(f"{code}: {count}" for code, count in self.reasons.items())
            return f"nothing was compared, for no block ran fused ({counted or 'none was asked to'})"
        return "the patched model computes what the unpatched one computes"

    def as_dict(self) -> dict[str, Any]:
        checks = [{**vars(check), "passed": check.passed} for check in self.checks]
        return {
            "passed": bool(self),
            "fused_blocks": self.fused_blocks,
            "reasons": self.reasons,
            "checks": checks,
            "sentence": self.sentence,
        }

    def __str__(self) -> str:
        if self.nothing_ran_fused and all(check.passed for check in self.checks):
            return self.sentence
        lines = [
            f"{'ok  ' if c.passed else 'FAIL'} {c.recipe:9} {c.what:34} error {c.error:.1e}, limit {c.limit:.1e}"
            for c in self.checks
        ]
        blocks = ", ".join(f"{recipe}: {count}" for recipe, count in self.fused_blocks.items())
        return "\n".join([*lines, f"blocks that ran fused: {blocks}"])


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)


def error(actual: list[Tensor], exact: list[Tensor]) -> float:
    """The largest ||actual - exact|| / ||exact|| over pairs, in float64.

    Norms below 1e-12 of the largest count as that: rounding noise around zero, as a convolution bias's gradient
    under a batch-normalised output, has no relative accuracy.
    """
    if len(actual) != len(exact):
        return float("inf")
    norms = [e.double().norm().item() for e in exact]
    floor = max(norms, default=0.0) * 1e-12 or 1.0
    differences = [(a.double() - e.double()).norm().item() for a, e in zip(actual, exact, strict=True)]
    return max((d / max(n, floor) for d, n in zip(differences, norms, strict=True)), default=0.0)


def kind(t: Tensor) -> tuple[Any, ...]:
    """Dtype, device, shape and memory layout: strides where they say anything."""
    strided = t.layout is torch.strided
    strides = [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] if strided else None
    return t.dtype, t.device, t.shape, t.layout, strides


def differing(actual: list[Tensor], expected: list[Tensor]) -> float:
    """How many tensors are of another kind than their counterparts; inf where their number differs."""
    if len(actual) != len(expected):
        return float("inf")
    return float(sum(kind(a) != kind(e) for a, e in zip(actual, expected, strict=True)))


@dataclass
class Run:
    """What one forward and backward of a model gave."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    buffers: list[Tensor]


def run(model: nn.Module, example: tuple[Any, ...], training: bool, backward: bool) -> Run:
    """One forward of the model, and the backward of a fixed random projection of its outputs, if any needs one."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(SEED)
        outputs = list(tensors(model.train(training)(*example)))
        if backward and any(out.requires_grad for out in outputs):
            loss = sum(
                (out * torch.randn(out.shape, dtype=out.dtype).to(out.device)).sum() for out in outputs
            )
            loss.backward()  # type: ignore[union-attr]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    buffers = [b.detach().clone() for b in model.buffers() if b.is_floating_point()]
    return Run([out.detach() for out in outputs], gradients, buffers)


def cast(example: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in example)


def check_blocks(model: nn.Module, caller: str) -> None:
    """As `check_model`; raises UnsupportedModelError for a model without residual blocks too."""
    check_model(model, caller)
    if not find(model):
        raise UnsupportedModelError(
            f"fusedres.{caller}: no residual block found in {type(model).__name__}, so there is nothing to compare; "
            "it needs modules that compute relu(BN(conv(...)) + shortcut) from one tensor."
        )


@dataclass
class Trials:
    """Runs of copies of one unpatched model, patched and not, and what they gave when held against each other.

    reasons: names of blocks that did not run fused, each with the code of the reason.
    """

    plain: nn.Module
    example: tuple[Any, ...]
    dtype: torch.dtype
    backend: str
    exact: dict[bool, Run] = field(default_factory=dict)  # in float64, by the mode
    checks: list[Check] = field(default_factory=list)
    fused: dict[str, int] = field(default_factory=dict)
    reasons: set[tuple[str, str]] = field(default_factory=set)

    def run_exactly(self, training: bool) -> None:
        """The unpatched model in float64: what the others are held against."""
        example = cast(self.example, torch.float64)
        self.exact[training] = run(copy.deepcopy(self.plain).double(), example, training, True)

    def hold(self, recipe: str, training: bool) -> None:
        """The patched model in one mode against the unpatched one, in float64 and in its own dtype."""
        exact, mode = self.exact[training], MODES[training]

        def check(what: str, value: float, limit: float) -> None:
            self.checks.append(Check(f"{mode}: {what}", recipe, value, limit))

        patched = patch(copy.deepcopy(self.plain).double(), recipe=recipe, backend=self.backend)
        found = run(patched, cast(self.example, torch.float64), training, True)
        self.note(recipe, report(patched))
        for what in ("outputs", "gradients", "buffers"):
            if what == "gradients" and not found.gradients and not exact.gradients:
                continue
            check(f"{what}, float64", error(getattr(found, what), getattr(exact, what)), FLOAT64_LIMIT)
        kinds = differing([*found.outputs, *found.gradients], [*exact.outputs, *exact.gradients])
        check("dtype, layout, float64", kinds, 0.0)
        patched = patch(copy.deepcopy(self.plain), recipe=recipe, backend=self.backend)
        low = run(patched, self.example, training, False)
        eager = run(copy.deepcopy(self.plain), self.example, training, False)
        value, own = (error(r.outputs, exact.outputs) for r in (low, eager))
        dtypes = (out.dtype for out in eager.outputs)
        coarsest = max(dtypes, key=lambda d: torch.finfo(d).eps, default=self.dtype)
        name = str(self.dtype).removeprefix("torch.")
        check(f"outputs, {name}", value, error_limit(own, coarsest))
        check(f"dtype, layout, {name}", differing(low.outputs, eager.outputs), 0.0)

    def note(self, recipe: str, ran: PatchReport) -> None:
        """Which blocks ran fused in either mode, and why the others did not."""
        fused = sum(block.runs_as in RECIPES for block in ran.matched)
        self.fused[recipe] = max(self.fused.get(recipe, 0), fused)
        for block in ran.blocks:
            if block.runs_as not in RECIPES and block.code is not None:
                self.reasons.add((block.name, block.code.partition(":")[0]))


def verify(
    model: nn.Module,
    example: Any,
    *,
    recipes: str | Iterable[str] = tuple(RECIPES),
    backend: str = AUTO_BACKEND,
    progress: Progress = untold,
) -> VerifyReport:
    """Compares copies of the model, patched with each recipe and unpatched.

    Args:
        model: patched or not; it is left alone.
        example: an input tensor, or a tuple of positional arguments.
        recipes: which to force, one or several.
        backend: as for `fusedres.patch`.
        progress: called between steps with what is done now, how many steps are over, and out of how many.

    Returns:
        A report that is true if everything agrees. A model whose outputs need no gradient has no gradients to compare.

    Raises:
        TypeError, UnsupportedModelError, BackendUnavailableError: as `fusedres.patch`.
    """
    check_blocks(model, "verify")
    example = example if isinstance(example, tuple) else (example,)
    plain = unpatch(initialised_copy(model, example))
    plain.zero_grad(set_to_none=True)
    dtype = next((p.dtype for p in plain.parameters() if p.is_floating_point()), torch.float32)
    trials = Trials(plain, example, dtype, backend)
    asked = (recipes,) if isinstance(recipes, str) else tuple(recipes)
    told = partial(progress, "checking")
    total = len(MODES) * (1 + len(asked))
    for done, training in enumerate(MODES):
        told(done, total)
        trials.run_exactly(training)
    for done, (recipe, training) in enumerate(product(asked, MODES), len(MODES)):
        told(done, total)
        trials.hold(recipe, training)
    told(total, total)
    reasons = Counter(code for _, code in sorted(trials.reasons))
    return VerifyReport(tuple(trials.checks), trials.fused, dict(reasons.most_common()))
