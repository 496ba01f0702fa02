"""Which backend serves a raw op: the only place that chooses, and the only one that reads its variable.

A `Dispatcher` is called with a record of `fusedres.ops.contract`; each call goes to the first of its backends that has
the op and no reason against the call. The reference comes last and takes everything.

    FUSEDRES_BACKEND=auto|native|triton|reference   the default for this process
    with use_backend("reference"): ...              for a block of code, in this thread

A name may end in "/strict": the same backends, with no algorithm that has more error than a direct convolution.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.errors import BackendUnavailableError
from fusedres.ops.backend import Backend, Function, Reason
from fusedres.ops.contract import BnStats, RawOp, op_name
from fusedres.ops.native import functions, library
from fusedres.ops.reference import REFERENCE
from fusedres.ops.set_aside import excludes, is_any

ENVIRONMENT_VARIABLE = "FUSEDRES_BACKEND"
AUTO = "auto"
STRICT = "/strict"  # ends a name
ACCURACIES = ("fast", "strict")


def _load_triton() -> Backend:
    from fusedres.ops import triton

    return triton.backend()


def _load_measured_triton() -> Backend:
    from fusedres.ops import triton, triton_reasons

    return triton.backend(measured=triton_reasons.is_measured_product)


# fastest first, the reference last; a backend that this installation or machine does not have is absent
LOADERS: dict[str, Callable[[], Backend]] = {
    **({library.NAME: functions.backend} if library.is_usable() else {}),
    **({"triton": _load_triton} if find_spec("triton") else {}),
    REFERENCE.name: lambda: REFERENCE,
}

# in place of its loader, where a caller named no backend: what is known to be no slower
AUTO_LOADERS: dict[str, Callable[[], Backend]] = {
    library.NAME: partial(functions.backend, measured=True),
    "triton": _load_measured_triton,
}

# for a backend that is absent: raises BackendUnavailableError with the reason
REQUIREMENTS: dict[str, Callable[[], None]] = {library.NAME: library.load}

_requested: ContextVar[str | None] = ContextVar("fusedres_backend", default=None)
# the same for graphs being compiled, of whatever thread: Dynamo cannot read a ContextVar, and guards on a global
_requested_by_any_thread: str | None = None


def backend_names() -> tuple[str, ...]:
    """The names that `backend=` accepts: "auto" and every backend of this installation."""
    return (AUTO, *LOADERS)


def with_accuracy(name: str, accuracy: str) -> str:
    """The name under which a dispatcher for this backend has this accuracy.

    Raises:
        ValueError: it is none of ACCURACIES.
    """
    if accuracy not in ACCURACIES:
        raise ValueError(f"fusedres: accuracy {accuracy!r} is unknown, choose from {', '.join(ACCURACIES)}")
    return name + STRICT if accuracy == "strict" else name


def check_backend(name: str) -> None:
    """Raises BackendUnavailableError unless `name` is one of `backend_names()`."""
    if name not in backend_names():
        if name in REQUIREMENTS:
            REQUIREMENTS[name]()
        raise BackendUnavailableError(
            f"fusedres: backend {name!r} is not available, found {', '.join(backend_names())}. "
            f"Choose one of those, by argument or by {ENVIRONMENT_VARIABLE}."
        )


class Candidate(NamedTuple):
    """A backend that has an op; reason: None where it serves every call of it."""

    backend: Backend
    reason: Reason | None
    function: Function


class Dispatcher:
    """Runs raw ops, each call on the first backend that serves it: `y, mask = ops(BnAddReluForward(c, scale, shift))`.

    Args:
        backends: in order of preference; the last must serve everything.
    """

    def __init__(self, backends: tuple[Backend, ...]) -> None:
        self.backends = backends
        self._candidates = {
            kind: tuple(
                Candidate(backend, backend.reasons.get(kind), backend.functions[kind])
                for backend in backends
                if kind in backend.functions
            )
            for kind in backends[-1].functions
        }

    def __call__(self, op: RawOp) -> Any:
        """The op's result, as its record says."""
        for backend, reason, function in self._candidates[type(op)]:
            if (reason is None or reason(op) is None) and not (is_any() and excludes(backend.name, op)):
                return function(op)
        raise self._unserved(op)

    def serving(self, op: RawOp) -> Backend:
        """The backend that serves this call; `serving(op)(op)` runs it there and asks no backend twice."""
        for backend, reason, _ in self._candidates[type(op)]:
            if (reason is None or reason(op) is None) and not (is_any() and excludes(backend.name, op)):
                return backend
        raise self._unserved(op)

    def backend_on(self, x: Tensor) -> str:
        """The name of the backend that serves BN on activations like x [N, C, H, W]."""
        return self.serving(BnStats(x)).name

    def _unserved(self, op: RawOp) -> BackendUnavailableError:
        found = ", ".join(f"{backend.name}: {backend.reason(op)}" for backend in self.backends)
        return BackendUnavailableError(
            f"fusedres: no backend serves this {op_name(type(op))} ({found}). "
            f"Put {REFERENCE.name} last, which serves everything."
        )


@cache
def _dispatcher(name: str) -> Dispatcher:
    base = name.removesuffix(STRICT)
    check_backend(base)
    if base == AUTO:
        backends = [AUTO_LOADERS.get(n, load)() for n, load in LOADERS.items()]
    else:
        backends = [LOADERS[n]() for n in dict.fromkeys((base, REFERENCE.name))]
    if base != name:
        strict = partial(functions.backend, strict=True, measured=base == AUTO)
        backends = [strict() if b.name == library.NAME else b for b in backends]
    return Dispatcher(tuple(backends))


# os.environ says by an exception that it lacks a variable, and every call of a block asks: what it looks into says less
_variables = getattr(os.environ, "_data", None) if os.name == "posix" else None
_as_variable = os.fsencode(ENVIRONMENT_VARIABLE)


def from_environment() -> str | None:
    """What the environment names now."""
    if _variables is not None and _as_variable not in _variables:
        return None
    return os.environ.get(ENVIRONMENT_VARIABLE)


def requested(name: str, here: str | None) -> str:
    """The name itself, or for "auto" that of a context, then of the environment; with the accuracy that it ends in."""
    if name not in (AUTO, AUTO + STRICT):
        return name
    return (here or from_environment() or AUTO) + name[len(AUTO) :]


def dispatcher(name: str = AUTO) -> Dispatcher:
    """The dispatcher for a requested backend.

    Args:
        name: a backend, then the reference; "auto" follows `use_backend`, then FUSEDRES_BACKEND, then takes
            every backend of this installation, fastest first.

    Raises:
        BackendUnavailableError: the name is unknown or the backend is not installed.
    """
    return _dispatcher(requested(name, _requested.get()))


class OpaqueBackend(NamedTuple):
    """A requested backend inside a graph being compiled, where `fusedres.autograd.operator` looks it up."""

    name: str

    def backend_on(self, x: Tensor) -> str:
        """As `Dispatcher.backend_on`."""
        return backend_serving(self.name, x.device.type, x.dtype, is_channels_last(x))


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def backend_serving(name: str, device: str, dtype: torch.dtype, channels_last: bool) -> str:
    """The backend that serves BN on activations of this kind."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty((2, 8, 2, 2), dtype=dtype, device=device, memory_format=layout)
    return dispatcher(name).backend_on(x)


# what torch.compiler.assume_constant_result does, without importing Dynamo, which takes seconds
backend_serving._dynamo_marked_constant = True  # type: ignore[attr-defined]


def opaque_backend(name: str = AUTO) -> OpaqueBackend:
    """As `dispatcher`, for a graph being compiled: it keeps the backend, and is compiled anew for another.

    `use_backend` counts here whatever thread entered it last; FUSEDRES_BACKEND is read when a graph is compiled.
    """
    return OpaqueBackend(requested(name, _requested_by_any_thread))


Ops = Dispatcher | OpaqueBackend


def operators(name: str = AUTO) -> Ops:
    """`dispatcher(name)`, or `opaque_backend(name)` in a graph being compiled."""
    return opaque_backend(name) if torch.compiler.is_compiling() else dispatcher(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context, in this thread, "auto" means `name`.

    Raises:
        BackendUnavailableError: the name is unknown or the backend is not installed.
    """
    check_backend(name)
    global _requested_by_any_thread
    token, before = _requested.set(name), _requested_by_any_thread
    _requested_by_any_thread = name
    try:
        yield
    finally:
        _requested.reset(token)
        _requested_by_any_thread = before
