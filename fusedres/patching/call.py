"""One call of a patched module: fused where nothing speaks against it, else by the original method.

`call` asks `decide`, which goes through `guards`, `resolve`, `read` and `choose`, and then runs what it is told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache, reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fusedres.blocks.choice import AUTO, UNFUSED, cause_before_reading, choose, may_be_untried
from fusedres.blocks.config import Shortcut
from fusedres.blocks.user_table import has_trials
from fusedres.matching.norms import FrozenNorm
from fusedres.matching.plan import ConvBNNames, Plan
from fusedres.modules.derived_class import BASE, STATE, base_class
from fusedres.nn.numbers import UnusualNumberError, square_window
from fusedres.nn.residual_block import (
    BlockCall,
    ConvBN,
    read_block,
    run,
    wants_gradient,
    with_residual,
)
from fusedres.ops.dispatch import Dispatcher, Ops, dispatcher, opaque_backend
from fusedres.patching import bound, details, guards, warm
from fusedres.patching.fits import Fit, key_of
from fusedres.patching.patched_class import ORIGINAL
from fusedres.patching.reasons import describe
from fusedres.patching.resolve import method_replaced, resolve
from fusedres.patching.shared_statistics import shared_statistics
from fusedres.patching.state import BlockState
from fusedres.trials import settings
from fusedres.trials.on_block import LeftCall, OnBlock, OutOfMemory, Turn

logger = logging.getLogger("fusedres")


@lru_cache(maxsize=1024)
def lines_of(base: type, recipe: str, head: str) -> list[str]:
    """What was logged of a class, a recipe and a code without its detail, which may name a size of the input."""
    return []


def log_once(base: type, recipe: str, code: str) -> None:
    """One line per class, recipe and code in a process; `report` has them per block."""
    head = code.partition(":")[0]
    lines = lines_of(base, recipe, head)
    if not lines:
        lines.append(f"{base.__qualname__} runs {recipe}: {head}: {describe(code)}")
        logger.info(lines[0])


class Decision(NamedTuple):
    """What a call comes to: the recipe, why it is not the one asked for, and what it runs on unless it is `unfused`."""

    recipe: str
    reason: str | None
    block: BlockCall | None = None
    ops: Ops | None = None
    shortcut: tuple[nn.Module, ...] = ()  # the modules whose outputs of x are added, with Shortcut.TENSOR
    turn: Turn | None = None  # of a trial


NO_MODULES: tuple[nn.Module, ...] = ()
AS_ASKED = Decision(UNFUSED, None)


class AfterStem:
    """A model as its own method sees it once its stem has run: the stem's first part gives y, the others hand it on."""

    def __init__(self, model: nn.Module, parts: list[str], y: Tensor) -> None:
        self.__dict__.update(dict.fromkeys(parts, lambda x: x), **{parts[0]: lambda x: y}, model=model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)


def call(module: nn.Module, base: type, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of a patched method of `base`: fused if nothing speaks against it, else by the original method."""
    state: BlockState | None = module.__dict__.get(STATE)
    original = getattr(base, method)
    if state is None or getattr(type(module), BASE, None) is not base:  # `type(block).forward(another, x)`
        return original(module, *args, **kwargs)
    plan = state.plan
    if is_dynamo_compiling():  # a graph cannot hold what is noted below, nor a model's stand-in
        if plan.goes_on:
            return original(module, *args, **kwargs)
        decision = decide(module, state, args, kwargs, opaque_backend)
    else:
        if state.bound and guards.unfit_call(args, kwargs) is None:
            known = state.bound.get(bound.key(module, args[0]))
            if known is not None and (y := known.y(module, state, args[0])) is not None:
                state.runs_as, state.reason = known.recipe, known.reason
                return rest(module, original, y, args[0]) if plan.goes_on else y
        decision = decide(module, state, args, kwargs, dispatcher)
        if decision.reason is not None and decision.reason is not state.reason:
            log_once(base, decision.recipe, decision.reason)
        state.runs_as, state.reason = decision.recipe, decision.reason
        if decision.turn is not None and state.on_trial.is_timed(decision.turn):
            return on_trial(module, original, state.on_trial, decision, args)
    if decision.block is None or decision.ops is None:
        return original(module, *args, **kwargs)
    y = computed(decision)
    if isinstance(decision.ops, Dispatcher) and not decision.shortcut:
        decided = bound.Decided(decision.recipe, decision.reason, decision.turn)
        bound.bind(module, state, args[0], decision.block, decision.ops, decided)
    return rest(module, original, y, args[0]) if plan.goes_on else y


def computed(decision: Decision) -> Tensor:
    """y of a block, or of a stem, by the recipe that was decided on."""
    recipe, _, block, ops, shortcut, _ = decision
    assert block is not None and ops is not None
    if shortcut:
        return with_residual(block, recipe, ops, reduce(add, [part(block.x) for part in shortcut]))
    return run(block, recipe, ops)


def rest(module: nn.Module, original: Callable[..., Any], y: Tensor, x: Tensor) -> Any:
    """What a model's own method makes of the output of its stem. x: its input."""
    parts = [part.path for part in module.__dict__[STATE].plan.structure]
    return original(AfterStem(module, parts, y), x)


def on_trial(
    module: nn.Module,
    original: Callable[..., Any],
    trials: OnBlock,
    decision: Decision,
    args: tuple[Any, ...],
) -> Any:
    """A call whose time may be taken. Of a model's own method it is the stem that counts, and not what goes on."""
    plan, turn, x = module.__dict__[STATE].plan, decision.turn, args[0]
    assert turn is not None

    def by_the_original() -> Any:
        if not plan.goes_on:
            return original(module, x)
        return reduce(lambda y, part: getattr(module, part.path)(y), plan.structure, x)

    def by_the_recipe() -> Any:
        return computed(decision)

    try:
        y = trials.run(turn, by_the_original if decision.block is None else by_the_recipe)
    except OutOfMemory:
        y = by_the_original()
    return rest(module, original, y, x) if plan.goes_on else y


def decide(
    module: nn.Module,
    state: BlockState,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ops_for: Callable[[str], Ops],
) -> Decision:
    """What the call comes to; what is cheap to find out comes first. ops_for: from a backend's name, what runs it."""
    if state.recipe == UNFUSED:
        return AS_ASKED
    if (reason := guards.unfit_call(args, kwargs)) is not None:
        return Decision(UNFUSED, reason)
    x, plan, compiling = args[0], state.plan, ops_for is opaque_backend
    if state.recipe == AUTO and (reason := cause_before_reading(x, state.channels, compiling)) is not None:
        if compiling or not may_be_untried(x, torch.is_grad_enabled()) or x.device.type not in guards.DEVICES:
            return Decision(UNFUSED, reason)
        is_on = settings.is_on(x.device)
        if not (is_on or has_trials(x.device)):
            return Decision(UNFUSED, reason)
        reason = state.on_trial.left.get(LeftCall.of(module, x, ops_for(state.backend), is_on))
        if reason is not None and state.on_trial.forced is None:
            return Decision(UNFUSED, reason)
    if (reason := guards.transformed()) is not None:
        return Decision(UNFUSED, reason)
    key = (
        () if compiling else key_of(x, module.training)
    )  # a graph would be guarded by all that is remembered
    known = None if compiling else state.fits.of(key)
    if known is None and (reason := guards.unfit_input(x, plan.is_stem)) is not None:
        return Decision(UNFUSED, reason)
    ops = ops_for(state.backend)
    block, shortcut = None if known is None else known.unchanged(module, x), NO_MODULES
    if block is None:
        read = resolved(module, state, x, key, known, compiling)
        if isinstance(read, str):
            return Decision(UNFUSED, read)
        block, shortcut = read
    gradients = wants_gradient(block)
    recipe, reason, turn = chosen(module, state, x, block, ops, gradients)
    if recipe == UNFUSED:
        return Decision(recipe, reason, turn=turn)
    if (
        warm.on_gpu(x)
        and isinstance(ops, Dispatcher)
        and (cold := warm.not_warm(state, block, recipe, ops, gradients)) is not None
    ):
        return Decision(UNFUSED, cold)
    return Decision(recipe, reason, block, ops, shortcut, turn)


def resolved(
    module: nn.Module,
    state: BlockState,
    x: Tensor,
    key: tuple[Any, ...],
    known: Fit | None,
    compiling: bool,
) -> tuple[BlockCall, tuple[nn.Module, ...]] | str:
    """The block's call and the modules of its shortcut, after every question about its modules; or a reason.

    key: of the input, () in a graph being compiled; known: a call of this key that was found fit.
    """
    plan, base = state.plan, base_class(module)
    if getattr(type(module), ORIGINAL) is not getattr(base, plan.method):
        return f"forward_replaced:{base.__qualname__}.{plan.method}"
    if (reason := method_replaced(plan)) is not None:
        return reason
    modules = resolve(module, plan, state.harmless, compiling)
    if isinstance(modules, str):
        return modules
    shortcut = tuple([modules[path] for path in plan.shortcut_paths])
    block = None if known is None else known.call(plan, modules, x)
    if block is not None:
        state.fits.watch(key, module, plan, state.harmless)
        return block, shortcut
    seen = None if compiling else state.fits.before(key, plan, modules)
    what = fit(plan, modules, x, shortcut)
    if isinstance(what, str):
        return what
    if seen is not None:
        state.fits.remember(key, plan, modules, seen, what)
    return what, shortcut


def chosen(
    module: nn.Module, state: BlockState, x: Tensor, block: BlockCall, ops: Ops, gradients: bool
) -> tuple[str, str | None, Turn | None]:
    """The recipe of a call that was read, the reason where it is not the one asked for, and a trial's turn.

    What was on trial before is asked for first; else tables come first, and a trial where they are silent.
    """
    trials = state.on_trial
    arguments = state.recipe, block.config, block.tensors, block.x, ops, gradients
    if state.recipe != AUTO or not isinstance(ops, Dispatcher) or not may_be_untried(block.x, gradients):
        return *choose(*arguments), None
    was_tried = bool(trials.kinds)
    turn = trials.turn(block, ops, gradients) if was_tried else None
    if turn is None:
        choice = choose(*arguments)
        if choice.recipe != UNFUSED:
            return *choice, None
        turn = None if was_tried else trials.turn(block, ops, gradients)
    recipe, reason = choice if turn is None else (turn.recipe, turn.reason)
    if recipe == UNFUSED and reason is not None and (turn is None or turn.is_final):
        trials.leave(LeftCall.of(module, x, ops, settings.is_on(x.device)), reason)
    return recipe, reason, turn


def fit(plan: Plan, modules: dict[str, Any], x: Tensor, shortcut: tuple[nn.Module, ...]) -> BlockCall | str:
    """The data of the call, or what speaks against it."""
    block = read(plan, modules, x)
    if isinstance(block, str):
        return block
    others = modules.values() if shortcut else ()
    return guards.unfit_block(block, plan) or shared_statistics(block, others, plan) or block


def read(plan: Plan, modules: dict[str, Any], x: Tensor) -> BlockCall | str:
    """The data of the call from the plan's modules, x in the dtype of the convolutions; or why there is none."""
    units = [unit(modules, names) for names in plan.units]
    if (reason := guards.unreadable(units, plan)) is not None:
        return reason
    main, projection = (units, None) if plan.projection is None else (units[:-1], units[-1])
    x = guards.taken_by_stem(x, units[0].conv.weight) if plan.is_stem else x
    try:
        window = pool = modules[plan.pool] if isinstance(plan.pool, str) else plan.pool
        if isinstance(pool, nn.MaxPool2d) and (window := square_window(pool)) is None:
            return details.pooling(pool, plan)
        return read_block(x, main, projection, plan.shortcut is Shortcut.IDENTITY, window)
    except UnusualNumberError as error:
        return error.code


def unit(modules: dict[str, Any], names: ConvBNNames) -> ConvBN:
    bn = modules[names.bn]
    if names.frozen:
        bn = FrozenNorm(bn, names.eps)
    return ConvBN(modules[names.conv], bn, names.relu)
