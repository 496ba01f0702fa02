"""Every kernel is launched here, so that who records a block's steps sees the kernels among them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# of the kernel as it was compiled and loaded, its grid, and its arguments by name
Listener = Callable[[Any, tuple[int, ...], dict[str, Any]], None]


class Listening(threading.local):
    """Who listens in this thread."""

    listener: Listener | None = None


_listening = Listening()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`. args: its first arguments; options: the others, and how it is launched."""
    compiled = kernel[grid](*args, **options)
    if _listening.listener is not None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        _listening.listener(
            compiled, grid, named | {n: v for n, v in options.items() if n in kernel.arg_names}
        )


@contextmanager
def launches_to(listener: Listener) -> Iterator[None]:
    """Within the context, in this thread, the listener is told of every launch."""
    before, _listening.listener = _listening.listener, listener
    try:
        yield
    finally:
        _listening.listener = before
