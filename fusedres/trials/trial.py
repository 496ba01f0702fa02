"""The trial of one kind of call as a state machine: what runs next, what was measured, and the verdict.

In each round the original forward and every candidate run once, in turns: all of them compute the same function. A
verdict is sought after 5, 8 and 12 rounds, the first two of all left out. It follows from the ratios, round by round,
of the original's time to the candidate's: the bounds of their median are order statistics (Conover, Practical
Nonparametric Statistics, 3.2), so that nothing is assumed of how the times are spread.

Nothing here knows of tensors, of torch or of a clock: seconds are told, and what time it is comes from a function.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from math import comb
from typing import NamedTuple

ORIGINAL = "unfused"
DROPPED = 2  # first rounds: kernels are compiled, chosen and loaded, and memory is new
HOPELESS = {
    2: 0.9,
    3: 1.0,
}  # after so many rounds a candidate is out that was not above the ratio in any of them
LOOKS = (5, 8, 12)  # rounds after which a verdict is sought
NEEDED = 1.03  # a recipe wins if it is surely this many times as fast as the original forward
CONFIDENCE = 0.95  # of each bound
MOST_WAITING = 1024  # calls without an answer: the clock is never ready, or no backward comes
MOST_CALLS = 4 * (DROPPED + LOOKS[-1])  # of each way to run
MOST_SECONDS = 1800.0
LONGEST_GAP = 60.0  # between calls, of those seconds: what lies idle is not on trial
SHORTEST = 1e-9  # seconds: of a clock that did not move


@cache
def rank(n: int) -> int:
    """How many of the smallest of n values the lower bound of their median leaves out; none where n are too few."""
    below, k = 0.0, 0
    while (below := below + comb(n, k) / 2**n) <= 1 - CONFIDENCE:
        k += 1
    return max(k - 1, 0)


class Ratio(NamedTuple):
    """How many times as fast as the original: median and bounds, each of them right in 95 of 100 trials."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f} {self.high:.2f}]"


def ratio_of(ratios: list[float]) -> Ratio:
    """Of one ratio and more; of fewer than five the bounds are the least and the largest."""
    ordered, k = sorted(ratios), rank(len(ratios))
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Ratio(median, ordered[k], ordered[-1 - k])


class Verdict(NamedTuple):
    """What runs from now on. ratio: of the recipe, or where none won of the best candidate, None where there is none.

    why: where nothing was found out, what ended the trial.
    """

    recipe: str
    ratio: Ratio | None = None
    why: str | None = None


class Ticket(NamedTuple):
    """One call: the way that it runs, and its round."""

    arm: str
    round: int


@dataclass
class Trial:
    """Which of the candidates, if any, serves one kind of call. Any thread may ask and tell.

    Args:
        candidates: names of recipes.
        now: seconds of a clock that does not go back; for the budget alone.
    """

    candidates: tuple[str, ...]
    now: Callable[[], float]
    verdict: Verdict | None = None
    completed: int = 0  # rounds
    _live: list[str] = field(default_factory=list)
    _out: dict[str, str] = field(default_factory=dict)  # candidates that do not run here, and why
    _times: dict[str, list[float]] = field(default_factory=dict)  # of complete rounds, by way
    _open: dict[int, dict[str, float]] = field(default_factory=dict)  # of rounds not complete
    _queue: list[str] = field(default_factory=list)  # of the current round
    _round: int = -1
    _issued: int = 0
    _waiting: int = 0  # issued since the last answer
    _last: float | None = None  # when the newest call came
    _spent: float = 0.0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._live = list(self.candidates)
        self._times = {arm: [] for arm in (ORIGINAL, *self.candidates)}
        if not self._live:
            self._end("no candidate")

    def next(self) -> Ticket | None:
        """How the next call runs; None once there is a verdict."""
        with self._lock:
            self._check_budget()
            if self.verdict is not None:
                return None
            if not self._queue:
                self._round += 1
                arms = [ORIGINAL, *self._live]
                first = self._round % len(arms)  # nobody always goes first
                self._queue = arms[first:] + arms[:first]
            self._issued += 1
            self._waiting += 1
            return Ticket(self._queue.pop(0), self._round)

    def tell(self, ticket: Ticket, seconds: float) -> None:
        """What a call took."""
        with self._lock:
            self._waiting = 0
            if self.verdict is not None or ticket.arm in self._out:
                return
            times = self._open.setdefault(ticket.round, {})
            times[ticket.arm] = seconds
            self._complete(ticket.round)

    def drop(self, recipe: str, why: str) -> None:
        """This candidate does not run here."""
        with self._lock:
            if self.verdict is not None or recipe not in self._live:
                return
            self._out[recipe] = why
            self._leave(recipe)
            if not self._live:
                self._end(why)
                return
            for number in sorted(self._open):
                self._complete(number)

    @property
    def progress(self) -> str:
        """Rounds that are over, and how many are needed for the next look: "3/7"."""
        over = self.completed
        look = next((n for n in LOOKS if DROPPED + n > over), LOOKS[-1])
        return f"{over}/{DROPPED + look}"

    def _complete(self, number: int) -> None:
        times = self._open.get(number, {})
        if any(arm not in times for arm in (ORIGINAL, *self._live)):
            return
        del self._open[number]
        self.completed += 1
        if self.completed > DROPPED:
            for arm, seconds in times.items():
                self._times[arm].append(seconds)
            kept = self.completed - DROPPED
            if kept in LOOKS or kept in HOPELESS:
                self._look(kept)

    def _ratio(self, recipe: str) -> Ratio:
        pairs = zip(self._times[ORIGINAL], self._times[recipe], strict=True)
        return ratio_of([original / max(own, SHORTEST) for original, own in pairs])

    def _look(self, kept: int) -> None:
        found = {recipe: self._ratio(recipe) for recipe in self._live}
        best = max(found, key=lambda recipe: found[recipe].median)
        if kept in LOOKS and found[best].low >= NEEDED:
            self.verdict = Verdict(best, found[best])
            return
        for recipe, ratio in found.items():
            if kept == LOOKS[-1] or ratio.high < HOPELESS.get(kept, NEEDED):
                self._leave(recipe)
        if not self._live:
            self.verdict = Verdict(ORIGINAL, found[best])

    def _leave(self, recipe: str) -> None:
        self._live.remove(recipe)
        self._queue = [arm for arm in self._queue if arm != recipe]

    def _check_budget(self) -> None:
        if self.verdict is not None:
            return
        now = self.now()
        self._spent += min(now - self._last, LONGEST_GAP) if self._last is not None else 0.0
        self._last = now
        if self._waiting >= MOST_WAITING:
            self._end(f"{MOST_WAITING} calls in a row gave no time")
        elif self._issued >= MOST_CALLS * (1 + len(self.candidates)):
            self._end(f"{self._issued} calls settled nothing")
        elif self._spent > MOST_SECONDS:
            self._end(f"{MOST_SECONDS / 60:.0f} minutes settled nothing")

    def _end(self, why: str) -> None:
        self.verdict = Verdict(ORIGINAL, None, why)
