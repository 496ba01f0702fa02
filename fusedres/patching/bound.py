"""A block's call that is recorded, bound: nothing of it is decided anew while all that it was decided by is the same.

What `decide` asks about is asked here too, by identity, in one go: modules by their watch, tensors where the recording
is run. Whatever is not the same goes through `decide`, which knows why.
"""

from __future__ import annotations

import struct
import sys
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres.autograd import passes
from fusedres.autograd.bound import BoundBackward, Made, given_of
from fusedres.autograd.function import applied, memory_format, saved_tensors_have_hooks
from fusedres.blocks import choice, user_table
from fusedres.blocks.choice import AUTO
from fusedres.nn.residual_block import BlockCall, Observer, wants_gradient
from fusedres.nn.running_stats import BUFFERS
from fusedres.ops.dispatch import Dispatcher, dispatcher
from fusedres.ops.native import places
from fusedres.ops.native.from_python import ReplayBlock, replay_block, watch_reader
from fusedres.patching import guards
from fusedres.patching.fits import autocast_dtype, key_of
from fusedres.patching.resolve import has_global_hooks
from fusedres.patching.state import BlockState
from fusedres.recording import replays
from fusedres.trials import settings
from fusedres.trials.kind import Turn

MOST_BINDINGS = 64  # of calls of one key
MOST = 8  # of one block: forms of its input, and modes
PARAMETERS = 4  # of a unit

Key = tuple[torch.Size, tuple[int, ...], torch.dtype, bool, bool, bool]


class Chosen:
    """What "auto" went by as it chose the call's recipe. turn: of a trial that is over, where none of a table."""

    def __init__(self, x: Tensor, turn: Turn | None) -> None:
        self.turn = turn
        self.tables = choice.TABLE, user_table.table()
        self.is_on = settings.is_on(x.device)
        self.benchmark = torch.backends.cudnn.benchmark

    def holds(self, state: BlockState, x: Tensor, gradients: bool) -> bool:
        """Whether "auto" would choose the same."""
        trials, turn, (table, users) = state.on_trial, self.turn, self.tables
        if choice.TABLE is not table or user_table.table() is not users or user_table.are_recorded():
            return False
        if trials.forced is not None or trials.planned is not None or settings.is_on(x.device) != self.is_on:
            return False
        if turn is None:
            return not trials.kinds
        if turn.kind.final is not turn or torch.backends.cudnn.benchmark != self.benchmark:
            return False
        trials.latest = turn.kind
        return not (gradients and saved_tensors_have_hooks()) and not trials.is_timed(turn)


class Decided(NamedTuple):
    """What a call came to, and why not to the recipe that was asked for; turn: of a trial."""

    recipe: str
    reason: str | None
    turn: Turn | None


def tensors_at(block: BlockCall) -> tuple[list[int], list[int]]:
    """Where a reader of the block's watch gives what autograd takes, and what a recording moves; -1: None.

    The BNs come first; then of each unit weight, conv_bias, bn_weight, bn_bias; then of each the buffers.
    """
    units = len(block.norms)
    flat: list[int] = []
    moved: list[int] = []
    for i, (unit, bn) in enumerate(zip(block.config.units, block.norms, strict=True)):
        first, buffers = units + PARAMETERS * i, units * (1 + PARAMETERS) + len(BUFFERS) * i
        frozen = (-1, -1) if unit.training else (buffers + 1, buffers + 2)
        flat += [*range(first, first + PARAMETERS), *frozen]
        moved += range(buffers, buffers + len(BUFFERS)) if unit.training and bn.training else ()
    return flat, moved


class Bound:
    """One call of a block.

    Args:
        state: of the block; x: its input; block: the call; watch: of its modules, row: what its reader gives; found,
            recording: what served the call; replay: runs it.
    """

    def __init__(
        self,
        state: BlockState,
        x: Tensor,
        block: BlockCall,
        watch: tuple[Any, ...],
        row: list[Any],
        ops: Dispatcher,
        decided: Decided,
        found: replays.Pass,
        recording: replays.Recording,
        replay: ReplayBlock,
    ) -> None:
        config = block.config
        self.recipe, self.reason, turn = decided
        self.asked = state.recipe, state.backend
        self.kind = x.device.type  # of device; which one it is, the recording knows
        self.gradients, self.casts_to = wants_gradient(block), autocast_dtype(self.kind)
        self.config, self.ops = config, ops
        self.generation, self.found, self.recording = replays.generation(), found, recording
        self.chosen = Chosen(x, turn) if state.recipe == AUTO else None
        flat, moved = tensors_at(block)
        given = [i for i in (*flat, *moved) if i >= 0 and row[i] is not None]
        self.flat = itemgetter(*flat)
        is_given = given_of([row[i] if i >= 0 else None for i in flat])
        self.backward = BoundBackward(self.recipe, ops, config, is_given, recording.note, self.kind)
        self.places = places.Places([row[i] for i in given])
        # What csrc/front/replay_python.cpp goes by: the watch; where in its row the tensors that are taken stand, and
        # their addresses, for none is held; the recording and where they lie, by number; whether one of them or x wants
        # a gradient, None where nobody asks.
        addresses = struct.pack(f"{len(given)}P", *(id(row[i]) for i in given))
        wants = self.gradients if torch.is_grad_enabled() else None
        number = recording.number, self.places.number
        self.replay = replay
        self.call = watch, tuple(given), addresses, *number, wants, sys.intern("requires_grad")
        self.stem_takes = None if block.x is x else (block.x.dtype, memory_format(block.x))
        self.bindings = 1  # of calls of this key so far

    def y(self, module: nn.Module, state: BlockState, x: Tensor) -> Tensor | None:
        """The block's output; None where the call is to be decided on. x: a plain tensor, of the key's shape."""
        kind, (recipe, backend) = self.kind, self.asked
        if state.recipe != recipe or state.backend != backend or autocast_dtype(kind) is not self.casts_to:
            return None
        if dispatcher(backend) is not self.ops or replays.generation() != self.generation:
            return None
        if guards.differentiated() is not None or has_global_hooks() or not replays.are_on_for(kind):
            return None
        if self.chosen is not None and not self.chosen.holds(state, x, self.gradients):
            return None
        if not replays.is_for_kernels(x):
            return None
        if self.stem_takes is not None:
            if guards.is_refused_by_graphs(x):
                return None
            dtype, layout = self.stem_takes
            x = x.to(dtype).contiguous(memory_format=layout)
        keeps = self.gradients and not saved_tensors_have_hooks()  # they are to see all that is kept
        run = self.recording.run_block
        out = replays.again(self.found, self.recording, x, run, self.replay, self.call, module, x, keeps)
        if out is None:
            return None
        results, row = out
        y: Tensor = results[0]
        if not self.gradients:
            return y
        row.append(None)  # at -1
        made = Made(y, passes.saved_of(results[1:]), self.recording.note, self.backward)
        return applied(self.config, self.recipe, self.ops, made, x, None, *self.flat(row))


def key(module: nn.Module, x: Tensor) -> Key | None:
    """What a call is bound by; None: it is not to be bound."""
    if x.layout is not torch.strided:
        return None
    return x.shape, x.stride(), x.dtype, x.requires_grad, torch.is_grad_enabled(), module.training


def is_dense(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=memory_format(x))


def bind(
    module: nn.Module, state: BlockState, x: Tensor, block: BlockCall, ops: Dispatcher, decided: Decided
) -> None:
    """Binds a call that has just run, where a recording served it and nothing else of it is unusual. x: its input."""
    read, replay, fit = watch_reader(), replay_block(), state.fits.of(key_of(x, module.training))
    if read is None or replay is None or fit is None or fit.watch is None or not replays.are_on(x):
        return
    if block.x is not x and (x.requires_grad or not is_dense(block.x)):  # a graph has the cast in it
        return
    name = key(module, x)
    if name is None:
        return
    before = state.bound.get(name)
    if before is None and name in state.bound:
        return
    recipe, _, turn = decided
    if turn is not None and turn is not turn.kind.final:
        return
    gradients, is_frozen = wants_gradient(block), not all(unit.training for unit in block.config.units)
    if gradients and is_frozen:  # what is frozen is copied in every call
        return
    flat = [*chain.from_iterable(block.tensors)]
    found = passes.forward_pass(recipe, ops, block.config, Observer(block), block.x, flat, gradients)
    recording = None if found is None else found.latest  # which another thread may have it forget
    row = read(fit.watch, module)
    if found is None or recording is None or row is None or not fit.holds(row[len(block.norms) :]):
        return
    if not all(replays.is_for_kernels(t) for t in row[len(block.norms) :] if t is not None):
        return
    made = Bound(state, x, block, fit.watch, row, ops, decided, found, recording, replay)
    if before is not None:
        made.bindings += before.bindings
    elif len(state.bound) >= MOST:
        state.bound.clear()
    # what is bound again and again, as by inputs that are aligned now and then, costs more than it brings
    state.bound[name] = made if made.bindings <= MOST_BINDINGS else None
