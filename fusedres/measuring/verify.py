"""Holds a patched model against the unpatched one: outputs, gradients, running statistics, on the user's own input.

Whole models are compared in float64, to 1e-10, in training and evaluation mode; in the model's own dtype only
outputs are, by their error against float64 relative to the unpatched model's own (sign flips of a ReLU near zero
would drown everything else in lower precision). Dtype, memory layout and device have to be the same in both, under
the caller's autocast, grad mode and default dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.blocks import RECIPES
from fusedres.errors import UnsupportedModelError
from fusedres.modules.lazy import initialised_copy
from fusedres.ops.accuracy import error_limit
from fusedres.ops.dispatch import AUTO as AUTO_BACKEND
from fusedres.patching.api import check_model, find, patch, report, unpatch

FLOAT64_LIMIT = 1e-10
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
    """Every comparison. True if all passed and some block ran fused."""

    checks: tuple[Check, ...]
    fused_blocks: dict[str, int]  # recipe asked for -> blocks that ran fused

    def __bool__(self) -> bool:
        return all(check.passed for check in self.checks) and any(self.fused_blocks.values())

    def as_dict(self) -> dict[str, Any]:
        checks = [{**vars(check), "passed": check.passed} for check in self.checks]
        return {"passed": bool(self), "fused_blocks": self.fused_blocks, "checks": checks}

    def __str__(self) -> str:
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


def verify(
    model: nn.Module,
    example: Any,
    *,
    recipes: str | Iterable[str] = tuple(RECIPES),
    backend: str = AUTO_BACKEND,
) -> VerifyReport:
    """Compares copies of the model, patched with each recipe and unpatched.

    Args:
        model: patched or not; it is left alone.
        example: an input tensor, or a tuple of positional arguments.
        recipes: which to force, one or several.
        backend: as for `fusedres.patch`.

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
    exact_example = cast(example, torch.float64)
    exact = {
        training: run(copy.deepcopy(plain).double(), exact_example, training, True)
        for training in (True, False)
    }
    checks: list[Check] = []
    fused: dict[str, int] = {}
    for recipe in (recipes,) if isinstance(recipes, str) else recipes:
        for training, mode in ((True, "training"), (False, "evaluation")):
            patched = patch(copy.deepcopy(plain).double(), recipe=recipe, backend=backend)
            found = run(patched, exact_example, training, True)
            fused[recipe] = sum(block.runs_as in RECIPES for block in report(patched).matched)
            for what in ("outputs", "gradients", "buffers"):
                if what == "gradients" and not found.gradients and not exact[training].gradients:
                    continue
                value = error(getattr(found, what), getattr(exact[training], what))
                checks.append(Check(f"{mode}: {what}, float64", recipe, value, FLOAT64_LIMIT))
            kinds = differing(
                [*found.outputs, *found.gradients], [*exact[training].outputs, *exact[training].gradients]
            )
            checks.append(Check(f"{mode}: dtype, layout, float64", recipe, kinds, 0.0))
            low = run(patch(copy.deepcopy(plain), recipe=recipe, backend=backend), example, training, False)
            eager = run(copy.deepcopy(plain), example, training, False)
            value, own = (error(r.outputs, exact[training].outputs) for r in (low, eager))
            coarsest = max(
                (out.dtype for out in eager.outputs), key=lambda d: torch.finfo(d).eps, default=dtype
            )
            name = str(dtype).removeprefix("torch.")
            checks.append(Check(f"{mode}: outputs, {name}", recipe, value, error_limit(own, coarsest)))
            kinds = differing(low.outputs, eager.outputs)
            checks.append(Check(f"{mode}: dtype, layout, {name}", recipe, kinds, 0.0))
    return VerifyReport(tuple(checks), fused)
