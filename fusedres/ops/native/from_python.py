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

# number, inputs, bundle, keeps, places: as the operator `replay`
Replay = Callable[[int, list[Tensor], int, bool, int], tuple[list[Tensor], int]]
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


@cache
def replay() -> Replay | None:
    """The operator `replay`, for plain tensors that have a storage. torch's functions that pass tensors to C and back
    are not public; Inductor's C++ code is called through them."""
    of_torch = getattr(torch._C, "_aoti", None)
    names = "unsafe_alloc_void_ptrs_from_tensors", "alloc_tensors_by_stealing_from_void_ptrs"
    if not all(hasattr(of_torch, name) for name in names):
        return None
    return function("fusedres_replay_function", tuple(getattr(of_torch, name) for name in names))


@cache
def bundle_drop() -> Callable[[int], None] | None:
    """The operator `bundle_drop`."""
    return function("fusedres_bundle_drop_function")
