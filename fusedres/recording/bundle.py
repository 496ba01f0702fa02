"""What a replay of a forward pass leaves for that of the backward pass, kept by the native library."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fusedres.ops.native import from_python


@cache
def drop() -> Callable[[int], None]:
    return from_python.bundle_drop() or torch.ops.fusedres_native.bundle_drop.default


class Bundle:
    """Tensors that a replay made, and that only the replay of another pass is to read: they need not pass by Python.

    given: which of the pass's results they are; the others are None.
    """

    def __init__(self, number: int, given: tuple[bool, ...]) -> None:
        self.number, self.given = number, given
        self._tensors: list[Tensor | None] | None = None

    def __del__(self) -> None:
        if not sys.is_finalizing():  # as the process ends the library keeps what it has
            drop()(self.number)

    def tensors(self) -> list[Tensor | None]:
        """The results, for whoever is no replay."""
        if self._tensors is None:
            made = iter(torch.ops.fusedres_native.bundle_tensors.default(self.number))
            self._tensors = [next(made) if here else None for here in self.given]
        return self._tensors
