"""How far a measurement is: what it tells whoever waits for it."""

from __future__ import annotations

from collections.abc import Callable

# called between steps, never within a timed one: what is being done, how many steps of it are over, out of how many
Progress = Callable[[str, int, int], object]


def untold(what: str, done: int, total: int) -> None:
    """Tells nobody."""
