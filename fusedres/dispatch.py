"""Which backend serves a raw op: the only place that chooses, and the only one that reads its variable.

A `Dispatcher` has every raw op as a method; each call goes to the first of its backends whose `supports`
gives no reason against it. The reference comes last and takes everything.

    FUSEDRES_BACKEND=auto|native|triton|reference   the default for this process
    with use_backend("reference"): ...              for a block of code, in this thread
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from fusedres.backends import native
from fusedres.backends.reference import ReferenceOps
from fusedres.errors import BackendUnavailableError
from fusedres.raw_ops import RAW_OPS, RawOps

ENVIRONMENT_VARIABLE = "FUSEDRES_BACKEND"
AUTO = "auto"


def _load_triton() -> RawOps:
    from fusedres.backends.triton import TritonOps

    return cast(RawOps, TritonOps())


# fastest first, the reference last; a backend that this installation or machine does not have is absent
LOADERS: dict[str, Callable[[], RawOps]] = {
    **native.loaders(),
    **({"triton": _load_triton} if find_spec("triton") else {}),
    "reference": cast(Callable[[], RawOps], ReferenceOps),
}

# for a backend that is absent: raises BackendUnavailableError with the reason
REQUIREMENTS: dict[str, Callable[[], None]] = {"native": native.load}

_requested: ContextVar[str | None] = ContextVar("fusedres_backend", default=None)
# the same for graphs being compiled, of whatever thread: Dynamo cannot read a ContextVar, and guards on a global
_requested_by_any_thread: str | None = None


def backend_names() -> tuple[str, ...]:
    """The names that `backend=` accepts: "auto" and every backend of this installation."""
    return (AUTO, *LOADERS)


def check_backend(name: str) -> None:
    """Raises BackendUnavailableError unless `name` is one of `backend_names()`."""
    if name not in backend_names():
        if name in REQUIREMENTS:
            REQUIREMENTS[name]()
        raise BackendUnavailableError(
            f"fusedres: backend {name!r} is not available, found {', '.join(backend_names())}. "
            f"Choose one of those, by argument or by {ENVIRONMENT_VARIABLE}."
        )


class Dispatcher:
    """Every raw op, each call served by the first backend that supports it.

    Args:
        backends: in order of preference; the last must support everything.
    """

    def __init__(self, backends: tuple[RawOps, ...]) -> None:
        self.backends = backends
        for op in RAW_OPS:
            setattr(self, op, partial(self._call, op))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...

    def _call(self, op: str, *args: Any, **kwargs: Any) -> Any:
        for backend in self.backends[:-1]:
            if backend.supports(op, *args, **kwargs) is None:
                return getattr(backend, op)(*args, **kwargs)
        return getattr(self.backends[-1], op)(*args, **kwargs)

    def serving(self, op: str, *args: Any, **kwargs: Any) -> str:
        """The name of the backend that would serve this call."""
        return next(b.name for b in self.backends if b.supports(op, *args, **kwargs) is None)

    def explain(self, op: str, *args: Any) -> list[tuple[str, str | None]]:
        """For one call, each backend in order with its reason against serving it (None: it serves)."""
        return [(backend.name, backend.supports(op, *args)) for backend in self.backends]


@cache
def _dispatcher(name: str) -> Dispatcher:
    check_backend(name)
    names = list(LOADERS) if name == AUTO else list(dict.fromkeys((name, "reference")))
    return Dispatcher(tuple(LOADERS[n]() for n in names))


def dispatcher(name: str = AUTO) -> Dispatcher:
    """The dispatcher for a requested backend.

    Args:
        name: a backend, then the reference; "auto" follows `use_backend`, then FUSEDRES_BACKEND, then takes
            every backend of this installation, fastest first.

    Raises:
        BackendUnavailableError: the name is unknown or the backend is not installed.
    """
    if name == AUTO:
        name = _requested.get() or os.environ.get(ENVIRONMENT_VARIABLE) or AUTO
    return _dispatcher(name)


class OpaqueBackend(NamedTuple):
    """A requested backend inside a graph being compiled, where the operators of `fusedres.opaque_blocks` look it up."""

    name: str

    def serving(self, op: str, x: Tensor) -> str:
        """As `Dispatcher.serving`, for activations like x."""
        return backend_serving(self.name, op, x.device.type, x.dtype, is_channels_last(x))


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def backend_serving(name: str, op: str, device: str, dtype: torch.dtype, channels_last: bool) -> str:
    """The backend that would serve `op` on one activation of this kind."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return dispatcher(name).serving(
        op, torch.empty((2, 8, 2, 2), dtype=dtype, device=device, memory_format=layout)
    )


# what torch.compiler.assume_constant_result does, without importing Dynamo, which takes seconds
backend_serving._dynamo_marked_constant = True  # type: ignore[attr-defined]


def opaque_backend(name: str = AUTO) -> OpaqueBackend:
    """As `dispatcher`, for a graph being compiled: it keeps the backend, and is compiled anew for another.

    `use_backend` counts here whatever thread entered it last; FUSEDRES_BACKEND is read when a graph is compiled.
    """
    if name == AUTO:
        name = _requested_by_any_thread or os.environ.get(ENVIRONMENT_VARIABLE) or AUTO
    return OpaqueBackend(name)


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
