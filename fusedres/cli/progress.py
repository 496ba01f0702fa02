"""Long work says how far it is, on stderr: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fusedres.measuring.progress import Progress as Told

SECONDS_APART = 5.0  # between the lines of a log
REFRESH_APART = 0.2  # between two states of a bar


@dataclass
class Spaced:
    """Passes on what it is told, but at most once in that many seconds."""

    passed_on: Callable[[str, int, int], object]
    apart: float
    clock: Callable[[], float] = time.monotonic
    last: float = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.clock()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = self.clock()
        if now - self.last >= self.apart:
            self.last = now
            self.passed_on(what, done, total)


def log(title: str, console: Console) -> Told:
    """Writes a line now and then; work that is over within seconds writes none."""
    start = time.monotonic()

    def line(what: str, done: int, total: int) -> None:
        elapsed = time.monotonic() - start
        # no markup, highlighting or wrapping: a line of a log is a line
        console.out(f"{title}: {what}, {done} of {total}, {elapsed:.0f} s", highlight=False)

    return Spaced(line, SECONDS_APART)


@contextmanager
def shown(title: str) -> Iterator[Told]:
    """Within the context, what to call between the steps of a long work."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield log(title, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # drawn between steps alone: a thread that draws would take time from what is being timed
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task(title, total=None)
        bar.refresh()

        def draw(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title}: {what}", completed=done, total=total, refresh=True)

        yield Spaced(draw, REFRESH_APART)
