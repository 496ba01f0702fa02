"""Which blocks `include` and `exclude` name."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from fusedres.patching.search import Found

Patterns = str | Iterable[str] | None
LISTED = 8  # names of blocks in an error


def read_patterns(option: str, patterns: object) -> tuple[str, ...] | None:
    """The patterns of include or exclude; None where none were given.

    Raises:
        TypeError: neither a string nor strings.
    """
    if patterns is None:
        return None
    if isinstance(patterns, str):
        return (patterns,)
    given = tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    if all(isinstance(pattern, str) for pattern in given):
        return given
    raise TypeError(
        f"fusedres.patch: {option} needs a pattern or a list of patterns, found {patterns!r}; "
        'pass names of blocks, as "layer1.*"'
    )


def selects(patterns: tuple[str, ...] | None, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns or ())


def check_included(include: tuple[str, ...] | None, found: list[Found]) -> None:
    """Raises ValueError if include was given and names none of the blocks."""
    names = [f.name for f in found]
    if include is None or not names or any(selects(include, name) for name in names):
        return
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    raise ValueError(
        f"fusedres.patch: include={list(include)} matches no block; the blocks found are "
        f"{', '.join(map(repr, names[:LISTED]))}{more}."
    )


def choose(found: list[Found], include: Patterns, exclude: Patterns) -> list[Found]:
    """The same, without the plans of what include or exclude leave out.

    Raises:
        TypeError, ValueError: as `read_patterns` and `check_included`.
    """
    only, without = read_patterns("include", include), read_patterns("exclude", exclude)
    check_included(only, found)
    return [
        f
        if (only is None or selects(only, f.name)) and not selects(without, f.name)
        else f._replace(plan=None, code="excluded")
        for f in found
    ]
