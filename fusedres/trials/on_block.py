"""What a patched block carries of the trials: which kinds of its calls are measured, and how the next one runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres.autograd.function import saved_tensors_have_hooks
from fusedres.blocks import RECIPES, gram_form, prologue_form, user_table
from fusedres.blocks.choice import UNFUSED, is_untried
from fusedres.nn.residual_block import BlockCall, compute_dtype
from fusedres.ops.dispatch import Dispatcher
from fusedres.ops.triton_reasons import NAME as TRITON
from fusedres.trials import proof, registry, settings
from fusedres.trials.clocks import clock_of
from fusedres.trials.kind import Kind, Turn, is_out_of_memory
from fusedres.trials.timed import is_in_backward, timed
from fusedres.trials.trial import Ticket, Trial
from fusedres.trials.whole_model import WholeModel

MOST_KNOWN = 256  # kinds of calls of one block
MOST_OPEN = 16  # of them on trial at once: inputs of ever other sizes would all be new
OUT_OF_MEMORY = "out of memory"


class OutOfMemory(Exception):
    """A candidate had no memory, and is out."""


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
    planned: str | None = None  # the same, while Triton's kernels are compiled and none of them is launched

    def leave(self, call: LeftCall, reason: str) -> None:
        if len(self.left) >= MOST_KNOWN:
            self.left.clear()
        self.left[call] = reason

    def is_timed(self, turn: Turn) -> bool:
        """Whether the call is more than one that runs as ever: its time is asked for, or its graph is watched."""
        if turn.ticket is not None or turn.step is not None or turn.is_held:
            return True
        return self.whole.is_in_forward(turn.kind.key.gradients)

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
        kind = self.latest = self.kind_of(call, ops, gradients)
        if kind is None:
            return None
        if self.planned is not None:
            is_served = self.planned in kind.candidates and self.runs_nothing_unproved(kind, call, ops)
            return Turn(kind, self.planned if is_served else UNFUSED, None)
        is_on = kind.final is not None or settings.is_on(x.device)
        if kind.trial is None:
            kind.trial = self.trial_for(kind, call, ops, is_on)
        if self.forced is not None:
            return Turn(kind, self.forced if self.forced in (UNFUSED, *kind.candidates) else UNFUSED, None)
        if gradients and saved_tensors_have_hooks():
            return self.held(kind)
        if kind.final is not None:
            return kind.final
        is_settled = kind.verdict is not None and (kind.is_lost or self.whole.is_over(gradients))
        if is_settled or not is_on or kind.trial is None or is_in_backward():
            turn = self.by_verdict(kind, None)
            kind.final = turn if is_settled else None
            return turn
        kind.poll()
        ticket = kind.trial.next() if kind.is_open else None
        if ticket is None:
            return self.by_verdict(kind, x.shape)
        self.whole.goes_on_trial(self.place, kind.key)
        return Turn(kind, ticket.arm, f"measuring:{kind.trial.progress}", ticket)

    def kind_of(self, call: BlockCall, ops: Dispatcher, gradients: bool) -> Kind | None:
        """The call's kind; None where tables decide."""
        x = call.x
        shape = x.shape, x.stride(), x.device, torch.backends.cudnn.benchmark
        kind_of_call = call.config, ops, gradients, shape
        if kind_of_call not in self.kinds:
            if len(self.kinds) >= MOST_KNOWN:  # but a checkpoint's, which has to go on as it began
                self.kinds = {k: kind for k, kind in self.kinds.items() if kind is not None and kind.graphs}
            self.kinds[kind_of_call] = self.new_kind(call, ops, gradients)
        return self.kinds[kind_of_call]

    def new_kind(self, call: BlockCall, ops: Dispatcher, gradients: bool) -> Kind | None:
        config, x, units = call.config, call.x, call.tensors
        if not is_untried(x, config.dtype, ops, gradients):
            return None
        if user_table.key_of(x, config, units, ops, gradients) in user_table.table():
            return None
        key = user_table.key_of(x, config, units, ops, gradients, exact=True)
        suits = {
            "gram": gram_form.unsuitable(config, units, x) is None,
            # on a GPU, where its kernels are others than separate's; of a bottleneck gram has more in prologues
            "prologue": x.is_cuda and prologue_form.is_basic(config, units),
        }
        return Kind(key, clock_of(x.device), tuple(r for r in RECIPES if suits.get(r, True)))

    def trial_for(self, kind: Kind, call: BlockCall, ops: Dispatcher, is_on: bool) -> Trial | None:
        """The trial of a kind, settled where a table has its verdict; None where it may not begin. is_on: whether
        calls may be measured now."""
        gram = "gram" in kind.candidates
        question = call.config, call.tensors, gram, ops
        if not is_on and not (registry.is_known(kind.key) and proof.is_known(*question)):
            return None
        if sum(other is not None and other.is_open for other in self.kinds.values()) >= MOST_OPEN:
            return registry.without_candidates("too many kinds of calls at once")
        # what a table names was proved too, in another process: what is wrong has to be set aside in this one
        if (why := proof.prove(*question)) is not None:
            kind.candidates = ()
            return registry.without_candidates(f"no kernel could be proved, {why}")
        return registry.trial_of(kind.key, kind.candidates)

    @staticmethod
    def runs_nothing_unproved(kind: Kind, call: BlockCall, ops: Dispatcher) -> bool:
        """Whether a call that launches none of Triton's kernels runs no kernel of another backend without a proof."""
        if all(backend.is_plain or backend.name == TRITON for backend in ops.backends):
            return True
        return proof.is_known(call.config, call.tensors, "gram" in kind.candidates, ops)

    def held(self, kind: Kind) -> Turn:
        """A checkpoint's call, or one whose saved tensors somebody else keeps."""
        if not is_in_backward() and not kind.graphs:
            verdict, comparison = kind.verdict, self.whole.modes[True].comparison
            kind.settled = UNFUSED if verdict is None or comparison.kept is False else verdict.recipe
        recipe = kind.settled or UNFUSED
        reason = "not_measured_here:saved tensors have hooks" if recipe == UNFUSED else None
        return Turn(kind, recipe, reason, is_held=not is_in_backward())

    def by_verdict(self, kind: Kind, shape: torch.Size | None) -> Turn:
        """shape: of the input, where the call may count as one of the whole model's."""
        verdict, whole, gradients = kind.verdict, self.whole, kind.key.gradients
        if verdict is None:
            return Turn(kind, UNFUSED, "not_measured_here:measuring is off")
        registry.keep(kind.key, verdict.recipe, verdict.ratio)
        whole.settles(self.place, kind.key)
        if verdict.recipe == UNFUSED:
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
        if turn.is_held:
            y = compute()
            kind.hold(y)
            return y
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
        with_backward = kind.key.gradients
        tell, begins = partial(kind.tell, ticket), partial(kind.begun.add, ticket)
        try:
            return timed(compute, kind.clock, with_backward, tell, begins)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if ticket.arm == UNFUSED or not is_out_of_memory(error):
                raise
        if kind.trial is not None:
            kind.trial.drop(ticket.arm, OUT_OF_MEMORY)
        raise OutOfMemory

    @property
    def told(self) -> str | None:
        """For a report: how far the trial of the latest call is, or what it found."""
        kind = self.latest
        if kind is None or kind.trial is None:
            return None
        if kind.verdict is None:
            return f"measuring {kind.trial.progress}"
        return None if kind.verdict.ratio is None else str(kind.verdict.ratio)


def lost(why: str | None, ratio: object) -> str:
    """The reason code of a verdict for the original forward."""
    return f"not_measured_here:{why}" if ratio is None else f"no_faster_recipe:the best had {ratio}"
