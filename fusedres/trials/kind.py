"""One kind of call of one block: its trial, the times that are not known yet, and what has to stay as it is."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from fusedres.blocks.choice import UNFUSED
from fusedres.blocks.user_table import Key
from fusedres.trials.clocks import Clock
from fusedres.trials.comparison import Step
from fusedres.trials.timed import Stamps
from fusedres.trials.trial import Ticket, Trial, Verdict


class Token:
    """Lives as long as the autograd graph of a call."""


@dataclass
class Kind:
    """trial: None as long as nothing may be measured. candidates: the recipes that there are for such calls.

    Under hooks of saved tensors all calls run by the recipe `settled` as long as the graph of one of them lives: a
    checkpoint's second forward has to save what the first one did.
    """

    key: Key
    clock: Clock
    candidates: tuple[str, ...]
    trial: Trial | None = None
    waiting: list[tuple[Ticket, Stamps]] = field(default_factory=list)  # for their time
    begun: set[Ticket] = field(default_factory=set)  # whose backward began, and has not ended
    settled: str | None = None
    graphs: WeakSet[Token] = field(default_factory=WeakSet)
    final: Turn | None = None  # of every call from now on, without one that is measured
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def verdict(self) -> Verdict | None:
        return None if self.trial is None else self.trial.verdict

    @property
    def is_lost(self) -> bool:
        return self.verdict is not None and self.verdict.recipe == UNFUSED

    @property
    def is_open(self) -> bool:
        return self.trial is not None and self.trial.verdict is None

    def poll(self) -> None:
        """Tells the trial of every call whose time is known by now, and of recipes whose backward failed."""
        assert self.trial is not None
        with self.lock:
            for ticket in self.begun:
                if ticket.arm != UNFUSED:
                    self.trial.drop(ticket.arm, "its backward did not end")
            self.begun.clear()
            self.answer()

    def answer(self) -> None:
        assert self.trial is not None
        with self.lock:
            while self.waiting:
                ticket, stamps = self.waiting[0]
                parts = [self.clock.seconds(*stamp) for stamp in stamps]
                if any(part is None for part in parts):
                    return
                del self.waiting[0]
                self.trial.tell(ticket, sum(part for part in parts if part is not None))

    def tell(self, ticket: Ticket, stamps: Stamps) -> None:
        with self.lock:
            self.begun.discard(ticket)
            self.waiting.append((ticket, stamps))
            self.answer()

    def hold(self, y: Any) -> None:
        """Calls under hooks run as this one did as long as the graph of y lives."""
        if isinstance(y, Tensor) and y.grad_fn is not None:
            token = Token()
            self.graphs.add(token)
            y.grad_fn.register_hook(lambda *gradients, token=token: None)


class Turn(NamedTuple):
    """How one call runs, and why not as it was asked to. ticket, step: what its time is for, if anything.

    is_held: calls like it have to run the same way until its graph is gone.
    """

    kind: Kind
    recipe: str
    reason: str | None
    ticket: Ticket | None = None
    step: Step | None = None
    is_held: bool = False

    @property
    def is_final(self) -> bool:
        """Whether every such call will run by the original forward."""
        return self.recipe == UNFUSED and self.kind.is_lost


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)
