"""The Triton backend under test: outputs inside poisoned margins, and proof that Triton served the calls."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from raw_op_cases import Case
from torch import Tensor

from fusedres.backends.reference import ReferenceOps
from fusedres.backends.triton import TritonOps
from fusedres.dispatch import Dispatcher
from fusedres.raw_ops import RawOps

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


class CountingOps(TritonOps):
    """Counts the calls that Triton serves, by op."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[tuple[str, str | None]] = []

    def supports(self, op: str, *args: Any, **kwargs: Any) -> str | None:
        reason = super().supports(op, *args, **kwargs)
        self.reasons.append((op, reason))
        return reason


class TracedOps:
    """A backend that notes (op, its name) in `trace` for every call it serves."""

    def __init__(self, backend: RawOps, trace: list[tuple[str, str]]) -> None:
        self.backend, self.trace, self.name = backend, trace, backend.name
        self.supports = backend.supports

    def __getattr__(self, op: str) -> Any:
        self.trace.append((op, self.name))
        return getattr(self.backend, op)


@contextmanager
def served_by_triton(case: Case) -> Iterator[Dispatcher]:
    """Triton, then the reference; afterwards, that no call fell back but for the reason the case is about."""
    triton = CountingOps()
    assert triton.interpreted or case.device != "cpu", "needs TRITON_INTERPRET=1"
    yield Dispatcher((triton, ReferenceOps()))
    assert triton.reasons, "no op was called"
    expected = {"empty", None} if 0 in case.shape else {None}
    assert {reason for _, reason in triton.reasons} <= expected, triton.reasons
