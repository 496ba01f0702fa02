"""Runs every raw op on every backend that serves it here, and judges the results by `fusedres.ops.accuracy`.

Exact values: the reference in float64. Yardstick: plain PyTorch in the tested dtype on the same device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedres.ops import set_aside
from fusedres.ops.accuracy import error_limit, relative_error
from fusedres.ops.backend import Backend, Function
from fusedres.ops.cases import SMALL, OpCase, cases
from fusedres.ops.contract import (
    BnStats,
    Conv1x1BackwardWeight,
    Conv1x1GramBackwardInput,
    ConvOutput,
    Gram,
    RawOp,
)
from fusedres.ops.dispatch import LOADERS
from fusedres.ops.reference import REFERENCE
from fusedres.ops.reference.values import activation, rows_by_channels, selected, sums

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Outcome:
    """One op on one backend. problem: None if it passed. unserved: the backend's reason for not taking the call."""

    backend: str
    device: str
    dtype: str
    case: str
    problem: str | None = None
    unserved: str | None = None


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors inside arguments or results, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors(item)


def exactly(value: Any) -> Any:
    """Arguments in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        items = [exactly(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def yardstick(op: RawOp) -> Any:
    """The op in plain PyTorch in the arguments' dtype; products take operands of it, as the contract lets them."""
    return PRODUCTS.get(type(op), REFERENCE)(op)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype)


def activation_rows(c: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return rows_by_channels(activation(c, scale, shift)).to(scale.dtype)  # [N, C, H, W] -> [P, C]


def eager_gram(op: Gram) -> tuple[Tensor, Tensor]:
    a = activation_rows(op.c, op.scale, op.shift)  # [P, Cin]
    centered = rounded(a - a.mean(0), op.c.dtype)
    return a.mean(0), centered.t() @ centered / a.shape[0]


def eager_backward_weight(op: Conv1x1BackwardWeight) -> tuple[Tensor, Tensor]:
    assert op.center is not None
    dz = rows_by_channels(selected(op.dy, op.mask)).to(op.scale.dtype)  # [P, Cout]
    a = activation_rows(op.c, op.scale, op.shift)  # [P, Cin]
    return dz.t() @ rounded(a - op.center, op.c.dtype), dz.sum(0)


def eager_gram_backward_input(op: Conv1x1GramBackwardInput) -> tuple[Tensor, Tensor, Tensor]:
    c, vectors = op.c, op.vectors
    assert op.weight_a is not None and op.center is not None and op.offset is not None
    n, channels, h, w = c.shape
    acc, dtype = vectors.scale.dtype, c.dtype
    dz = rows_by_channels(selected(op.dy, op.mask)).to(acc)  # [P, Cout]
    a = activation_rows(c, vectors.scale, vectors.shift)  # [P, Cin]
    da = dz @ rounded(op.weight_dz, dtype)
    da = da + rounded(a - op.center, dtype) @ rounded(op.weight_a, dtype) + op.offset
    below = torch.where(a <= 0, 0, da).to(dtype).view(n, h, w, channels).permute(0, 3, 1, 2)
    return below, *sums(below, c, vectors.mean)


PRODUCTS: dict[type, Function] = {
    Gram: eager_gram,
    Conv1x1BackwardWeight: eager_backward_weight,
    Conv1x1GramBackwardInput: eager_gram_backward_input,
}


def expected(op: RawOp, found: Any) -> tuple[Any, Any]:
    """The call's result in float64, and in plain PyTorch; statistics are those of the y that was found, as stored."""
    exact, eager = REFERENCE(exactly(op)), yardstick(op)
    if isinstance(found, ConvOutput) and found.mean is not None:
        (mean, var), (eager_mean, eager_var) = (
            REFERENCE(BnStats(found.y.double())),
            REFERENCE(BnStats(found.y)),
        )
        exact, eager = exact._replace(mean=mean, var=var), eager._replace(mean=eager_mean, var=eager_var)
    return exact, eager


def problem(op: RawOp, found: Any) -> str | None:
    """What is wrong with the result of a call, or None: masks and indices exact, all else by the rule of accuracy."""
    exact, eager, actual = (list(tensors(part)) for part in (*expected(op, found), found))
    if len(actual) != len(exact):
        return f"{len(actual)} results, needed {len(exact)}"
    for place, (a, e, x) in enumerate(zip(actual, eager, exact, strict=True)):
        if a.shape != x.shape or a.dtype != e.dtype:
            return f"result {place} is {a.dtype} {list(a.shape)}, needed {e.dtype} {list(x.shape)}"
        if not a.is_floating_point():
            wrong = int((a != x).sum())
            if wrong:
                return f"result {place} differs in {wrong} of {a.numel()} values"
            continue
        error, limit = relative_error(a, x), error_limit(relative_error(e, x), a.dtype)
        if not error <= limit:  # true for NaN
            return f"result {place} has error {error:.1e}, limit {limit:.1e}"
    return None


def outcome(backend: Backend, device: torch.device, dtype: torch.dtype, case: OpCase) -> Outcome:
    """Runs one case on one backend; what it raises is a problem too."""
    where = backend.name, str(device), str(dtype).removeprefix("torch."), case.name
    reason = backend.reason(case.op)
    if reason is not None:
        return Outcome(*where, unserved=reason)
    try:
        found = backend(case.op)
        aside = set_aside.found().get(set_aside.Place(backend.name, type(case.op), device))
        return Outcome(*where, problem=aside or problem(case.op, found))
    except Exception as error:  # whatever a kernel or a compiler raises is what a self-test is to show
        return Outcome(*where, problem=f"{type(error).__name__}: {error}")


def devices() -> tuple[torch.device, ...]:
    """The CPU and every CUDA device."""
    return torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))


def run() -> list[Outcome]:
    """Every backend but the reference, which is the yardstick, on every device, dtype and op at small shapes."""
    backends = [load() for name, load in LOADERS.items() if name != REFERENCE.name]
    return [
        outcome(backend, device, dtype, case)
        for device in devices()
        for dtype in DTYPES
        for shape in SMALL
        for case in cases(shape, dtype, device)
        for backend in backends
    ]
