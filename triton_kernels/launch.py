"""Every kernel is launched here, so that who records a block's steps sees the kernels among them, and who compiles
ahead has them compiled without launching any."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# of the kernel as it was compiled and loaded, its grid, and its arguments by name
Listener = Callable[[Any, tuple[int, ...], dict[str, Any]], None]
# of the kernel, its grid, its first arguments, and the others with how it is launched
Instead = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]


class Listening(threading.local):
    """Who listens in this thread, and what is done in place of a launch."""

    listener: Listener | None = None
    instead: Instead | None = None


_listening = Listening()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`. args: its first arguments; options: the others, and how it is launched."""
    if _listening.instead is not None:
        _listening.instead(kernel, grid, args, options)
        return
    compiled = kernel[grid](*args, **options)
    if _listening.listener is not None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        _listening.listener(
            compiled, grid, named | {n: v for n, v in options.items() if n in kernel.arg_names}
        )


@contextmanager
def _within(name: str, value: Callable[..., None]) -> Iterator[None]:
    before = getattr(_listening, name)
    setattr(_listening, name, value)
    try:
        yield
    finally:
        setattr(_listening, name, before)


@contextmanager
def launches_to(listener: Listener) -> Iterator[None]:
    """Within the context, in this thread, the listener is told of every launch."""
    with _within("listener", listener):
        yield


def is_launching() -> bool:
    """Whether this thread launches kernels, so that they write what they are to write."""
    return _listening.instead is None


@contextmanager
def instead_of_launching(instead: Instead) -> Iterator[None]:
    """Within the context, in this thread, this is called for every launch, and nothing is launched."""
    with _within("instead", instead):
        yield


def compile_for(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Compiles the kernel as `launch` would: now, or by the pool of an `AsyncCompileMode` that is active here."""
    kernel.warmup(*args, grid=grid, **options)


def leave_out(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Neither compiles nor launches."""
