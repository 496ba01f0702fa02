"""Ops that a backend cannot run or computes wrongly here: each is set aside, said once, and another backend goes on.

A compiler that is missing, a cache that cannot be written, an assembler or a driver that refuses a kernel: nothing has
run by then, so another backend can compute the same call. An error of the GPU itself, or out of memory, is neither:
the first leaves the process without a usable context, the second is the caller's to act on. Both are raised as they
are.
"""

from __future__ import annotations

import errno
import subprocess
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.ops.contract import RawOp, op_name

# what CUDA says where a driver or a device takes no such kernel: found as it is loaded or launched, before it runs
REFUSALS = (
    "no kernel image is available",
    "device kernel image is invalid",
    "PTX was compiled with an unsupported toolchain",
    "PTX JIT compil",
    "too many resources requested",
    "shared object initialization failed",
)
REPORT = "please report it with the output of `fusedres doctor`"
# what to do about it, by what an error says
MENDS = (
    (("compiler", "gcc", "clang"), "install a C compiler (apt-get install gcc), or name one in CC"),
    (
        ("kernel image", "provided PTX", "PTX JIT"),
        "update the GPU's driver, or install the triton that came with this torch",
    ),
    (("libcuda",), "install the GPU's driver, or name the folder of libcuda.so.1 in TRITON_LIBCUDA_PATH"),
)
# where Triton keeps what it compiled
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}
CACHE = "set TRITON_CACHE_DIR to a folder that can be written and has space"


class Place(NamedTuple):
    """Where an op failed."""

    backend: str
    kind: type  # of the op's record
    device: torch.device


_found: dict[Place, str] = {}


def found() -> dict[Place, str]:
    """Every op that was set aside in this process, and what was raised."""
    return dict(_found)


def excludes(backend: str, op: RawOp) -> bool:
    """Whether this call must go to another backend."""
    tensor = next(t for t in op if isinstance(t, Tensor))
    return Place(backend, type(op), tensor.device) in _found


def is_any() -> bool:
    """Whether anything was set aside in this process; every call of every op asks."""
    return bool(_found)


def generation() -> int:
    """Another number as soon as something more was set aside."""
    return len(_found)


def is_aside(backend: str, kind: type, device: torch.device) -> bool:
    return bool(_found) and Place(backend, kind, device) in _found


def forget() -> None:
    """Everything is tried again, as after a compiler was installed."""
    _found.clear()


def is_of_toolchain(error: Exception) -> bool:
    """Whether the kernel never ran, for a reason of the installation, so that another backend may serve the call."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        return False
    if isinstance(error, (OSError, ImportError, subprocess.SubprocessError)) or is_of_triton(error):
        return True
    said = str(error)
    if isinstance(error, RuntimeError):
        return any(refusal in said for refusal in REFUSALS) or "CUDA" not in said
    return (
        isinstance(error, AssertionError) and "libcuda" in said
    )  # what Triton raises where there is no driver


def is_of_triton(error: Exception) -> bool:
    """Whether Triton's compiler, or its check of a kernel's resources, raised this."""
    from triton.errors import TritonError

    return isinstance(error, TritonError)


def mend(error: Exception) -> str:
    """What to do about it."""
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return CACHE
    said = str(error)
    known = (line for words, line in MENDS if any(word in said for word in words))
    return next(known, REPORT)


def described(error: Exception) -> str:
    """The error in one line, and what to do about it."""
    said = f"{type(error).__name__}: {error}".strip()
    first, *rest = said.splitlines()
    return f"{first.rstrip('.')}{' ...' if rest else '.'} To mend it: {mend(error)}."


def note(place: Place, error: Exception) -> None:
    """Sets the op aside on its device and says so, once."""
    if place in _found:
        return
    _found[place] = described(error)
    warnings.warn(
        f"fusedres: {place.backend} cannot run {op_name(place.kind)} on {place.device} and is set aside for it; "
        f"plain PyTorch computes it instead. {_found[place]}",
        RuntimeWarning,
        stacklevel=4,
    )


def note_wrong(place: Place, problem: str) -> None:
    """Sets aside an op whose results are wrong, and says so, once."""
    if place in _found:
        return
    _found[place] = problem
    warnings.warn(
        f"fusedres: {place.backend} computes {op_name(place.kind)} wrongly on {place.device} ({problem}) and is set "
        f"aside for it; another backend computes it instead. To mend it: {REPORT}.",
        RuntimeWarning,
        stacklevel=4,
    )


def warn_unusable(backend: str, device: torch.device, error: Exception) -> None:
    """Says that a backend runs nothing on a device."""
    warnings.warn(
        f"fusedres: {backend} runs no kernel on {device}; other backends serve it. {described(error)}",
        RuntimeWarning,
        stacklevel=4,
    )


def explain(error: Exception, place: Place) -> None:
    """Adds to an error that is raised as it is which op it came from, and where to report it."""
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(
            f"fusedres: raised while {place.backend} ran {op_name(place.kind)} on {place.device}. If "
            f'patch(model, backend="reference") runs without it, {REPORT}.'
        )
