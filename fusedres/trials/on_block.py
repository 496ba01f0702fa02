"""What a patched block carries of the trials: which kinds of its calls are measured, and how the next one runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres.autograd.function import saved_tensors_have_hooks
from fusedres.blocks import RECIPES, gram_form, user_table
from fusedres.blocks.choice import UNFUSED, is_untried
from fusedres.blocks.user_table import Key
from fusedres.nn.residual_block import BlockCall, compute_dtype
from fusedres.ops.dispatch import Dispatcher
from fusedres.trials import proof, registry, settings
from fusedres.trials.clocks import Clock, clock_of
from fusedres.trials.comparison import Step
from fusedres.trials.timed import Stamps, is_in_backward, timed
from fusedres.trials.trial import Ticket, Trial
from fusedres.trials.whole_model import WholeModel

MOST_KNOWN = 256  # kinds of calls of one block
OUT_OF_MEMORY = "out of memory"


class OutOfMemory(Exception):
    """A candidate had no memory, and is out."""


@dataclass
class Kind:
    """One kind of call of one block. settled: how calls run under hooks of saved tensors, the same in all of them: a
    checkpoint's second forward has to save what the first one did."""

    key: Key
    trial: Trial
    clock: Clock
    candidates: tuple[str, ...]  # the recipes that there are for it
    waiting: list[tuple[Ticket, Stamps]] = field(default_factory=list)
    settled: str | None = None
    final: Turn | None = None  # of every call from now on, without one that is measured

    @property
    def is_lost(self) -> bool:
        return self.trial.verdict is not None and self.trial.verdict.recipe == UNFUSED

    def poll(self) -> None:
        """Tells the trial of every call whose time is known by now."""
        while self.waiting:
            ticket, stamps = self.waiting[0]
            parts = [self.clock.seconds(*stamp) for stamp in stamps]
            if any(part is None for part in parts):
                return
            del self.waiting[0]
            self.trial.tell(ticket, sum(part for part in parts if part is not None))

    def tell(self, ticket: Ticket, stamps: Stamps) -> None:
        self.waiting.append((ticket, stamps))
        self.poll()


class Turn(NamedTuple):
    """How one call runs, and why not as it was asked to. ticket, step: what its time is for, if anything."""

    kind: Kind
    recipe: str
    reason: str | None
    ticket: Ticket | None = None
    step: Step | None = None

    @property
    def is_final(self) -> bool:
        """Whether every such call will run by the original forward."""
        return self.recipe == UNFUSED and self.kind.is_lost


class LeftCall(NamedTuple):
    """What is known of a call before its block is read: enough to leave it to the original forward once more.

    A norm that is frozen meanwhile, or a parameter, would be a call of another kind: it is left too.
    """

    ops: Dispatcher
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    computed_in: torch.dtype
    with_gradients: bool
    training: bool
    is_on: bool  # whether such a call may be measured

    @classmethod
    def of(cls, module: nn.Module, x: Tensor, ops: Any, is_on: bool) -> LeftCall:
        modes = torch.is_grad_enabled(), module.training, is_on
        return cls(ops, x.shape, x.stride(), x.dtype, compute_dtype(x), *modes)


@dataclass
class OnBlock:
    """Of one block. place: its number among those of the model."""

    whole: WholeModel = field(default_factory=WholeModel)
    place: int = 0
    kinds: dict[Hashable, Kind | None] = field(default_factory=dict)  # None: the tables decide
    latest: Kind | None = None
    left: dict[LeftCall, str] = field(default_factory=dict)  # to the original forward, for good; and why
    forced: str | None = None  # how every call on trial runs, while a CUDA graph of the model is made

    def leave(self, call: LeftCall, reason: str) -> None:
        if len(self.left) >= MOST_KNOWN:
            self.left.clear()
        self.left[call] = reason

    def is_timed(self, turn: Turn) -> bool:
        """Whether the time of this call is asked for; others are run as ever."""
        is_step = turn.step is not None or self.whole.is_in_forward(turn.kind.key.gradients)
        return turn.ticket is not None or is_step

    @property
    def candidates(self) -> tuple[str, ...]:
        """The recipes that the latest call could run by."""
        return () if self.latest is None else self.latest.candidates

    def __deepcopy__(self, memo: dict[int, Any]) -> OnBlock:
        """A copy is another block of another model: it begins with what the process knows by then."""
        return OnBlock(copy.deepcopy(self.whole, memo), self.place)

    def turn(self, call: BlockCall, ops: Dispatcher, gradients: bool) -> Turn | None:
        """How a call runs that no table names a recipe for; None where that is not for a trial to say."""
        x = call.x
        shape = x.shape, x.stride(), x.device, torch.backends.cudnn.benchmark
        kind_of_call = call.config, ops, gradients, shape
        if kind_of_call in self.kinds:
            kind = self.kinds[kind_of_call]
        else:
            if len(self.kinds) >= MOST_KNOWN:
                self.kinds.clear()
            is_on = settings.is_on(x.device)
            kind = self.opened(call, ops, gradients, is_on)
            if kind is not None or is_on:
                self.kinds[kind_of_call] = kind
        self.latest = kind
        if kind is None:
            return None
        if self.forced is not None:
            return Turn(kind, self.forced if self.forced in (UNFUSED, *kind.candidates) else UNFUSED, None)
        if is_in_backward() or (gradients and saved_tensors_have_hooks()):
            return self.unmeasured(kind)
        if kind.final is not None:
            return kind.final
        is_settled = kind.trial.verdict is not None and (kind.is_lost or self.whole.is_over(gradients))
        if is_settled or not settings.is_on(x.device):
            turn = self.by_verdict(kind, None)
            kind.final = turn if is_settled else None
            return turn
        kind.poll()
        ticket = kind.trial.next() if kind.trial.verdict is None else None
        if ticket is None:
            return self.by_verdict(kind, x.shape)
        self.whole.goes_on_trial(self.place, gradients)
        return Turn(kind, ticket.arm, f"measuring:{kind.trial.progress}", ticket)

    def opened(self, call: BlockCall, ops: Dispatcher, gradients: bool, is_on: bool) -> Kind | None:
        """A kind of call that was not seen before; None where tables decide. is_on: whether it may be measured."""
        config, x, units = call.config, call.x, call.tensors
        if not is_untried(x, config.dtype, ops, gradients):
            return None
        key = user_table.key_of(x, config, units, ops, gradients, exact=True)
        if not (is_on or registry.is_known(key)):
            return None
        if user_table.block_recipe(x, config, units, ops, gradients) is not None:
            return None
        gram = gram_form.unsuitable(config, units, x) is None
        recipes = tuple(recipe for recipe in RECIPES if recipe != "gram" or gram)
        # what a table names was proved too, in another process: what is wrong has to be set aside in this one
        if not is_on and not proof.is_known(config, units, gram, ops):
            return None
        if proof.prove(config, units, gram, ops) is not None:
            return Kind(key, registry.without_candidates(), clock_of(x.device), ())
        return Kind(key, registry.trial_of(key, recipes), clock_of(x.device), recipes)

    def unmeasured(self, kind: Kind) -> Turn:
        """A checkpoint's call, or one whose saved tensors somebody else keeps: the same way each time."""
        if kind.settled is None:
            verdict = kind.trial.verdict
            kept = self.whole.modes[kind.key.gradients].comparison.kept is not False
            kind.settled = verdict.recipe if verdict is not None and kept else UNFUSED
        reason = "not_measured_here:saved tensors have hooks" if kind.settled == UNFUSED else None
        return Turn(kind, kind.settled, reason)

    def by_verdict(self, kind: Kind, shape: torch.Size | None) -> Turn:
        """shape: of the input, where the call may count as one of the whole model's."""
        verdict, whole, gradients = kind.trial.verdict, self.whole, kind.key.gradients
        if verdict is None:
            return Turn(kind, UNFUSED, "not_measured_here:measuring is off")
        registry.keep(kind.key, verdict.recipe, verdict.ratio)
        if verdict.recipe == UNFUSED:
            whole.loses(self.place, gradients)
            return Turn(kind, UNFUSED, lost(verdict.why, verdict.ratio))
        mode = whole.modes[gradients]
        fused, step = mode.comparison.kept is not False, None
        if shape is not None:
            fused, step = whole.begin(self.place, kind.key, shape)
        if mode.comparison.kept is False:
            return Turn(kind, UNFUSED, f"no_faster_recipe:the whole model, {mode.comparison.ratio}")
        if shape is None or mode.step is None:
            return Turn(kind, verdict.recipe, None, None, step)
        reason = f"measuring:the whole model {mode.comparison.progress}"
        return Turn(kind, verdict.recipe if fused else UNFUSED, reason, None, step)

    def run(self, turn: Turn, compute: Callable[[], Any]) -> Any:
        """What `compute` gives for the turn, timed where its time is asked for.

        Raises:
            OutOfMemory: a candidate had none, and has run nothing.
        """
        kind, step, ticket = turn.kind, turn.step, turn.ticket
        gradients = kind.key.gradients
        if ticket is not None:
            return self.measured(kind, ticket, compute)
        if gradients:
            if step is None:
                return compute()
            return timed(compute, kind.clock, True, self.whole.time_backward(step, kind.clock))
        if step is not None:
            self.whole.forward_begins(step, kind.clock)
        y = compute()
        self.whole.forward_went_on()
        return y

    def measured(self, kind: Kind, ticket: Ticket, compute: Callable[[], Any]) -> Any:
        try:
            return timed(compute, kind.clock, kind.key.gradients, lambda stamps: kind.tell(ticket, stamps))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if ticket.arm == UNFUSED or not is_out_of_memory(error):
                raise
        kind.trial.drop(ticket.arm, OUT_OF_MEMORY)
        raise OutOfMemory

    @property
    def told(self) -> str | None:
        """For a report: how far the trial of the latest call is, or what it found."""
        kind = self.latest
        if kind is None:
            return None
        verdict = kind.trial.verdict
        if verdict is None:
            return f"measuring {kind.trial.progress}"
        return None if verdict.ratio is None else str(verdict.ratio)


def lost(why: str | None, ratio: object) -> str:
    """The reason code of a verdict for the original forward."""
    return f"not_measured_here:{why}" if ratio is None else f"no_faster_recipe:the best had {ratio}"


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)
