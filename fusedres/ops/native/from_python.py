"""The native library's functions that Python calls as its own, past torch's dispatcher: see csrc/front/python.h.

Each is None where the library is not loaded, or this Python does not have what the library needs of it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.ops.native import library

# number, inputs, bundle, keeps: as the operator `replay`
Replay = Callable[[int, list[Tensor], int, bool], tuple[list[Tensor], int]]
# call, block, x, keeps: see fusedres/patching/bound.py
ReplayBlock = Callable[
    [tuple[Any, ...], nn.Module, Tensor, bool], tuple[list[Tensor], int, list[Tensor], list[Any]] | None
]
Read = Callable[[tuple[Any, ...], nn.Module], list[Any] | None]


def function(name: str, *arguments: Any) -> Any:
    """What the library's function of that name makes."""
    # without the lock somebody could change a dictionary while it is gone through
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)
    if not library.is_loaded() or sys.implementation.name != "cpython" or not has_lock():
        return None
    make = getattr(ctypes.PyDLL(str(library.LIBRARY)), name)
    make.restype, make.argtypes = ctypes.c_void_p, [ctypes.py_object] * len(arguments)
    address = make(*arguments)
    return None if address is None else ctypes.cast(address, ctypes.py_object).value


@cache
def watch_reader() -> Read | None:
    """`read(watch, block)`, of fusedres/patching/watch.py."""
    return function("fusedres_watch_reader")


def of_torch() -> tuple[Any, ...] | None:
    """torch's functions that pass tensors to C and back. They are not public; Inductor's C++ code is called through
    them."""
    names = "unsafe_alloc_void_ptrs_from_tensors", "alloc_tensors_by_stealing_from_void_ptrs"
    found = tuple(getattr(getattr(torch._C, "_aoti", None), name, None) for name in names)
    return None if None in found else found


@cache
def replay() -> Replay | None:
    """The operator `replay`, for plain tensors that have a storage."""
    torchs = of_torch()
    return None if torchs is None else function("fusedres_replay_function", torchs)


@cache
def replay_block() -> ReplayBlock | None:
    """The same of a whole block whose call is bound: with the inputs, and with what the watch read, behind it. None
    where the call is another one now."""
    torchs = of_torch()
    # is_neg: whether a tensor has a sign that the dispatcher would make true
    return None if torchs is None else function("fusedres_replay_block_function", (*torchs, Tensor.is_neg))


@cache
def bundle_drop() -> Callable[[int], None] | None:
    """The operator `bundle_drop`."""
    return function("fusedres_bundle_drop_function")
