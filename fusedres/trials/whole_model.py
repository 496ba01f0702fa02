"""One patched model on trial as a whole: which of its blocks won, and whether all of them together are a gain.

A step is timed from the call of the first block that won to the end of that block's backward or, without gradients, to
the end of the last such block's call: what a training loop or a server does in between has no part in it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fusedres.blocks import user_table
from fusedres.blocks.user_table import TOGETHER, UNFUSED, Key
from fusedres.trials import registry
from fusedres.trials.clocks import Clock
from fusedres.trials.comparison import Comparison, Step
from fusedres.trials.timed import Stamps


@dataclass
class Forward:
    """The step without gradients that runs: its beginning, and the end of the last block so far."""

    step: Step
    clock: Clock
    begin: Any
    end: Any = None


@dataclass
class Mode:
    """Steps with gradients, or without.

    on_trial: blocks that have no verdict yet. winners: by block, what it won. lead: the first block, in the model's
    order, that won.
    """

    comparison: Comparison = field(default_factory=Comparison)
    on_trial: set[int] = field(default_factory=set)
    winners: dict[int, Key] = field(default_factory=dict)
    step: Step | None = None
    forward: Forward | None = None
    waiting: list[tuple[Step, Clock, Any, Any]] = field(default_factory=list)  # for their time
    begun: bool = False
    over: bool = False  # said, and kept

    @property
    def lead(self) -> int:
        return min(self.winners)


class WholeModel:
    """What the blocks of one model share. name: of the model's class."""

    def __init__(self, name: str = "the model") -> None:
        self.name = name
        self.modes = {True: Mode(), False: Mode()}

    def __deepcopy__(self, memo: dict[int, Any]) -> WholeModel:
        return WholeModel(self.name)

    def is_settled(self) -> bool:
        """Whether nothing is on trial any more, of what was called so far."""
        return all(
            not m.on_trial and (not m.winners or m.comparison.kept is not None) for m in self.modes.values()
        )

    def goes_on_trial(self, block: int, gradients: bool) -> None:
        self.modes[gradients].on_trial.add(block)

    def begin(self, block: int, key: Key, shape: torch.Size) -> tuple[bool, Step | None]:
        """Whether a block that won runs its recipe in this call; and the step, if it begins with this call."""
        mode = self.modes[key.gradients]
        mode.on_trial.discard(block)
        if mode.winners.get(block) != key:
            mode.winners[block] = key
        if mode.on_trial or mode.over:
            return mode.comparison.kept is not False, None
        if block == mode.lead:
            self.tell_forward(mode)
            self.poll(mode)
            if not mode.begun:
                mode.begun = True
                self.look_up(mode)
                if mode.over:
                    return self.runs_fused(mode), None
            mode.step = mode.comparison.begin(shape)
            if mode.step is None:
                self.conclude(mode)
            return self.runs_fused(mode), mode.step
        return self.runs_fused(mode), None

    def is_over(self, gradients: bool) -> bool:
        """Whether it is known which of the blocks that won stay."""
        return self.modes[gradients].over

    def loses(self, block: int, gradients: bool) -> None:
        """A block's verdict is the original forward."""
        self.modes[gradients].on_trial.discard(block)

    def runs_fused(self, mode: Mode) -> bool:
        return mode.comparison.kept is not False if mode.step is None else mode.step.fused

    def time_backward(self, step: Step, clock: Clock) -> Callable[[Stamps], None]:
        """What is to be told the stamps of the lead's call."""
        mode = self.modes[True]

        def tell(stamps: Stamps) -> None:
            mode.waiting.append((step, clock, stamps[0][0], stamps[-1][1]))
            self.poll(mode)

        return tell

    def is_in_forward(self, gradients: bool) -> bool:
        """Whether a step without gradients is timed, of which the call is a part."""
        return not gradients and self.modes[False].forward is not None

    def forward_begins(self, step: Step, clock: Clock) -> None:
        self.modes[False].forward = Forward(step, clock, clock.stamp())

    def forward_went_on(self) -> None:
        """A block's call is over, of a step without gradients."""
        forward = self.modes[False].forward
        if forward is not None:
            forward.end = forward.clock.stamp()

    def tell_forward(self, mode: Mode) -> None:
        forward, mode.forward = mode.forward, None
        if forward is not None and forward.end is not None:
            mode.waiting.append((forward.step, forward.clock, forward.begin, forward.end))

    def poll(self, mode: Mode) -> None:
        while mode.waiting:
            step, clock, begin, end = mode.waiting[0]
            seconds = clock.seconds(begin, end)
            if seconds is None:
                return
            del mode.waiting[0]
            mode.comparison.tell(step, seconds)

    def key_of(self, mode: Mode) -> Key:
        """What a verdict on these blocks together is kept by."""
        keys = sorted(mode.winners.values())
        digest = hashlib.sha256(repr(keys).encode()).hexdigest()[:16]
        return keys[0]._replace(call=f"{len(keys)} blocks of a model together: {digest}")

    def look_up(self, mode: Mode) -> None:
        """What was found for these blocks before."""
        entry = user_table.table().get(self.key_of(mode))
        if entry is not None:
            mode.comparison.kept = entry.recipe != UNFUSED
            mode.comparison.ratio = registry.verdict_of(entry).ratio
            mode.over = True

    def conclude(self, mode: Mode) -> None:
        """Once it is known whether the winners stay: kept for the next run, and said if they do not."""
        mode.over = True
        comparison = mode.comparison
        registry.keep(self.key_of(mode), TOGETHER if comparison.kept else UNFUSED, comparison.ratio)
        if comparison.kept:
            return
        what = "training steps" if mode is self.modes[True] else "inference"
        warnings.warn(
            f"fusedres: {what} of {self.name} were {comparison.ratio} as fast with {len(mode.winners)} blocks fused, "
            "each of which had been faster alone; they run as unpatched again. A recipe that you name stays.",
            stacklevel=2,
        )
