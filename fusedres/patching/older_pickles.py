"""The names under which pickles of fusedres 0.1 keep a plan.

A plan names classes and functions of the code that it was found in. The plan in a pickle is therefore dropped, and
`install.complete` finds it again.
"""

from __future__ import annotations

from typing import Any


class Dropped:
    """Stands for whatever a pickle holds of an older plan."""

    def __new__(cls, *args: Any) -> Dropped:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Nothing of it is kept."""


def __getattr__(name: str) -> type[Dropped]:
    if name.startswith("__"):
        raise AttributeError(name)
    return Dropped
