"""Where tensors lie and what they are like, kept by the native library: whether others lie there and are the same."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.ops.native import library


class Places:
    """Of some strided tensors: data pointers, sizes, strides, dtypes, devices, and which are None."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.number = torch.ops.fusedres_native.places_add.default(tensors)
        drop = torch.ops.fusedres_native.places_drop.default
        weakref.finalize(self, drop, self.number).atexit = False
        self._hold = torch.ops.fusedres_native.places_hold.default

    def hold(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these are where those were, and like them. tensors: plain ones."""
        return bool(self._hold(self.number, tensors))


def of(tensors: Sequence[Tensor | None]) -> Places | None:
    """None where the native library is not in use: then Python has to compare."""
    return Places(tensors) if library.is_loaded() else None
