"""A whole model with and without the recipes that won: wins of single blocks must add up. A state machine.

Once no block of the model is on trial any more, whole steps run in turns with the winners and without, until the
bounds of the ratio say which is faster: the model keeps its winners unless it is surely, or at the end probably,
slower with them. As in `trial.py`, nothing here knows of tensors or of a clock.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from fusedres.trials.trial import LOOKS, SHORTEST, Ratio, ratio_of

MOST_WAITING = 64  # steps without a time
ENOUGH = 3  # pairs of which every one was a gain


class Step(NamedTuple):
    """One step of the model. fused: whether the winners run in it. shape: of its input; only equal ones are pairs."""

    fused: bool
    number: int
    shape: Hashable


@dataclass
class Comparison:
    """Whether the winners stay. kept: None until that is known. Any thread may ask and tell."""

    kept: bool | None = None
    ratio: Ratio | None = None  # how many times as fast the model is with the winners
    _steps: dict[Hashable, int] = field(default_factory=dict)  # by shape, how many began
    _times: dict[tuple[Hashable, int], dict[bool, float]] = field(default_factory=dict)  # by shape and pair
    _ratios: list[float] = field(default_factory=list)
    _waiting: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def begin(self, shape: Hashable) -> Step | None:
        """How the step that begins runs; None once it is known whether the winners stay."""
        with self._lock:
            if self._waiting >= MOST_WAITING and self.kept is None:
                self.kept = True  # nothing says otherwise: no step had a time
            if self.kept is not None:
                return None
            self._waiting += 1
            number = self._steps[shape] = self._steps.get(shape, -1) + 1
            # with, without; without, with: nobody always goes first
            return Step((number % 4) in (0, 3), number, shape)

    def tell(self, step: Step, seconds: float) -> None:
        """What a step took."""
        with self._lock:
            self._waiting = 0
            if self.kept is not None:
                return
            pair = step.shape, step.number // 2
            times = self._times.setdefault(pair, {})
            times[step.fused] = seconds
            if len(times) < 2:
                return
            del self._times[pair]
            self._ratios.append(times[False] / max(times[True], SHORTEST))
            if len(self._ratios) in (ENOUGH, *LOOKS):
                self._look()

    @property
    def progress(self) -> str:
        """Pairs of steps that are over, and how many are needed for the next look: "2/3"."""
        over = len(self._ratios)
        return f"{over}/{next((n for n in (ENOUGH, *LOOKS) if n > over), LOOKS[-1])}"

    def _look(self) -> None:
        self.ratio = ratio_of(self._ratios)
        if self.ratio.low >= 1:
            self.kept = True
        elif self.ratio.high < 1 and len(self._ratios) > ENOUGH:
            self.kept = False
        elif len(self._ratios) == LOOKS[-1]:
            self.kept = self.ratio.median >= 1
