"""Rows of text as lines in which the columns stand below one another: for terminals, pipes and files alike."""

from __future__ import annotations

from collections.abc import Iterable


def aligned(rows: Iterable[Iterable[str]]) -> list[str]:
    """One line a row, nothing cut off; every row has as many cells."""
    cells = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def section(title: str, rows: Iterable[Iterable[str]], *notes: str) -> str:
    """A title, the rows indented below it, and notes on them."""
    return "\n".join([title, *(f"  {line}" for line in (*aligned(rows), *notes))])
