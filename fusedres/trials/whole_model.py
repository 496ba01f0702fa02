"""One patched model on trial as a whole: which of its blocks won, and whether all of them together are a gain.

A step is timed from the call of the first block that won to the end of that block's backward or, without gradients, to
the end of the last such block's call: what a training loop or a server does in between has no part in it.
"""

from __future__ import annotations

import threading
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

GONE_AFTER = 4  # calls of every block
MOST_CALLS_A_STEP = 16  # of one block, before the backward


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

    on_trial: by block and kind of call, the number of the newest call that has no verdict yet. winners: by block, what
    it won. lead: the first block, in the model's order, that won.
    """

    comparison: Comparison = field(default_factory=Comparison)
    on_trial: dict[tuple[int, Key], int] = field(default_factory=dict)
    winners: dict[int, Key] = field(default_factory=dict)
    blocks: set[int] = field(default_factory=set)
    calls: int = 0
    step: Step | None = None
    lead_calls: int = 0  # of the step, whose backward has not come yet
    forward: Forward | None = None
    waiting: list[tuple[Step, Clock, Any, Any]] = field(default_factory=list)  # for their time
    begun: bool = False
    over: bool = False  # said, and kept

    @property
    def lead(self) -> int:
        return min(self.winners)

    def seen(self, block: int) -> None:
        self.blocks.add(block)
        self.calls += 1

    def drop_gone(self) -> None:
        """Forgets kinds of calls that no longer come, as those of an odd last batch, or before a layer was frozen."""
        oldest = self.calls - GONE_AFTER * len(self.blocks)
        self.on_trial = {key: call for key, call in self.on_trial.items() if call >= oldest}


class WholeModel:
    """What the blocks of one model share.

    name: of the model's class; None: of a block by itself. issued: how many calls and steps were to be timed.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.modes = {True: Mode(), False: Mode()}
        self.issued = 0
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> WholeModel:
        return WholeModel(self.name)

    def goes_on_trial(self, block: int, key: Key) -> None:
        with self.lock:
            mode = self.modes[key.gradients]
            mode.seen(block)
            mode.on_trial[block, key] = mode.calls
            self.issued += 1

    def settles(self, block: int, key: Key) -> None:
        """The block's calls of this kind have a verdict."""
        self.modes[key.gradients].on_trial.pop((block, key), None)

    def begin(self, block: int, key: Key, shape: torch.Size) -> tuple[bool, Step | None]:
        """Whether a block that won runs its recipe in this call; and the step, if it begins with this call."""
        with self.lock:
            mode = self.modes[key.gradients]
            mode.seen(block)
            mode.winners.setdefault(block, key)
            mode.drop_gone()
            if mode.on_trial or mode.over:
                return mode.comparison.kept is not False, None
            if block != mode.lead:
                return self.runs_fused(mode), None
            return self.begin_step(mode, key.gradients, shape)

    def begin_step(self, mode: Mode, gradients: bool, shape: torch.Size) -> tuple[bool, Step | None]:
        if gradients and mode.step is not None and 0 < mode.lead_calls < MOST_CALLS_A_STEP:
            mode.lead_calls += 1  # another forward before the backward of the step
            return self.runs_fused(mode), None
        self.tell_forward(mode)
        self.poll(mode)
        if not mode.begun:
            mode.begun = True
            self.look_up(mode)
            if mode.over:
                return self.runs_fused(mode), None
        mode.step, mode.lead_calls = mode.comparison.begin(shape), 1
        if mode.step is None:
            self.conclude(mode)
        else:
            self.issued += 1
        return self.runs_fused(mode), mode.step

    def is_over(self, gradients: bool) -> bool:
        """Whether it is known which of the blocks that won stay."""
        return self.modes[gradients].over

    def runs_fused(self, mode: Mode) -> bool:
        return mode.comparison.kept is not False if mode.step is None else mode.step.fused

    def time_backward(self, step: Step, clock: Clock) -> Callable[[Stamps], None]:
        """What is to be told the stamps of the lead's call."""
        mode = self.modes[True]

        def tell(stamps: Stamps) -> None:
            with self.lock:
                mode.lead_calls = 0
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
        with self.lock:
            forward = self.modes[False].forward
            if forward is not None:
                forward.end = forward.clock.stamp()

    def tell_forward(self, mode: Mode) -> None:
        forward, mode.forward = mode.forward, None
        if forward is not None and forward.end is not None:
            mode.waiting.append((forward.step, forward.clock, forward.begin, forward.end))

    def poll(self, mode: Mode) -> None:
        """Tells the comparison of every step whose time is known by now; with the lock."""
        while mode.waiting:
            step, clock, begin, end = mode.waiting[0]
            seconds = clock.seconds(begin, end)
            if seconds is None:
                return
            del mode.waiting[0]
            mode.comparison.tell(step, seconds)

    def key_of(self, mode: Mode) -> Key:
        """What a verdict on these blocks together is kept by."""
        return user_table.key_of_all(mode.winners.values(), "together")

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
        name, blocks = self.name or "a block", len(mode.winners)
        warnings.warn(
            f"fusedres: {what} of {name} were {comparison.ratio} as fast with {blocks} blocks fused, "
            "each of which had been faster alone; they run as unpatched again. A recipe that you name stays.",
            stacklevel=2,
        )
