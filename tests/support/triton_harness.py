"""The Triton backend under test: outputs inside poisoned margins, and proof that Triton served the calls."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from raw_op_cases import Case
from torch import Tensor

from fusedres.ops import triton
from fusedres.ops.backend import Backend
from fusedres.ops.contract import RawOp, op_name
from fusedres.ops.dispatch import Dispatcher
from fusedres.ops.reference import REFERENCE

MARGIN = 256  # elements before and after every tensor that a launcher makes
PATTERN = 0xA5  # every byte of a margin


@contextmanager
def checked_margins() -> Iterator[None]:
    """Within, each tensor a launcher makes lies between margins that are checked at the end.

    The tensor itself starts as bytes that read as a large value or NaN, so an element never written is seen.
    """
    layout = importlib.import_module("fusedres.triton_kernels.layout")
    plain, made = layout.empty, []

    def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        tensor = plain(shape, like, dtype)
        width = tensor.element_size()
        size = (tensor.numel() + 2 * MARGIN) * width
        buffer = torch.full((size,), 0xFF, dtype=torch.uint8, device=tensor.device)
        buffer[: MARGIN * width] = buffer[buffer.numel() - MARGIN * width :] = PATTERN
        made.append((buffer, MARGIN * width))
        return buffer.view(tensor.dtype).as_strided(shape, tensor.stride(), MARGIN)

    layout.empty = empty
    try:
        yield
    finally:
        layout.empty = plain
    assert made, "no launcher made a tensor"
    for buffer, margin in made:
        outside = torch.cat((buffer[:margin], buffer[buffer.numel() - margin :]))
        assert (outside == PATTERN).all(), "a kernel wrote outside its output"


def counting(backend: Backend, reasons: list[str | None]) -> Backend:
    """The same backend, which notes each of its reasons, None where it serves."""

    def reason(op: RawOp) -> str | None:
        reasons.append(backend.reason(op))
        return reasons[-1]

    return replace(backend, reasons=dict.fromkeys(backend.functions, reason))


def traced(backend: Backend, trace: list[tuple[str, str]]) -> Backend:
    """The same backend, which notes (op, its name) for every call it serves."""

    def function(op: RawOp) -> Any:
        trace.append((op_name(type(op)), backend.name))
        return backend(op)

    return replace(backend, functions=dict.fromkeys(backend.functions, function))


@contextmanager
def served_by_triton(case: Case) -> Iterator[Dispatcher]:
    """Triton, then the reference; afterwards, that no call fell back but for the reason the case is about."""
    reasons: list[str | None] = []
    assert os.environ.get("TRITON_INTERPRET") == "1" or case.device != "cpu", "needs TRITON_INTERPRET=1"
    yield Dispatcher((counting(triton.backend(), reasons), REFERENCE))
    assert reasons, "no op was called"
    expected = {"empty", None} if 0 in case.shape else {None}
    assert set(reasons) <= expected, reasons
