"""One call of a patched module: fused where nothing speaks against it, else by the original method.

The way of a call: `call`, `attempt`, `guards` and `resolve`, `read_block`, `choose`, `run`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache, reduce
from operator import add
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fusedres.blocks.choice import UNFUSED, choose, choose_stem, never_fused
from fusedres.blocks.config import Shortcut
from fusedres.matching.norms import FrozenNorm
from fusedres.matching.plan import BlockPlan, ConvBNNames, Plan, StemPlan
from fusedres.modules.derived_class import BASE, STATE, base_class
from fusedres.nn.numbers import UnusualNumberError
from fusedres.nn.residual_block import ConvBN, compute_dtype, read_block, run, wants_gradient, with_residual
from fusedres.nn.stem import stem_block
from fusedres.ops.dispatch import Ops, dispatcher, opaque_backend
from fusedres.patching import guards
from fusedres.patching.patched_class import ORIGINAL
from fusedres.patching.reasons import describe
from fusedres.patching.resolve import method_replaced, resolve, resolve_stem
from fusedres.patching.shared_statistics import shared_statistics
from fusedres.patching.state import BlockState

logger = logging.getLogger("fusedres")


@lru_cache(maxsize=1024)  # a detail may name a size of the input
def log_once(base: type, recipe: str, code: str) -> None:
    """One line per class, recipe and code in a process; `report` has them per block."""
    logger.info("%s runs %s: %s: %s", base.__qualname__, recipe, code.partition(":")[0], describe(code))


class Outcome(NamedTuple):
    """What a call came to: the recipe, why it is not the one asked for, and y unless the recipe is `unfused`."""

    recipe: str
    reason: str | None
    y: Tensor | None = None


AS_ASKED = Outcome(UNFUSED, None)
NO_FASTER_RECIPE = Outcome(UNFUSED, "no_faster_recipe")


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
        goes_on = isinstance(plan, StemPlan) and plan.goes_on
        y = None if goes_on else attempt(module, state, args, kwargs, opaque_backend).y
        return original(module, *args, **kwargs) if y is None else y
    recipe, reason, y = attempt(module, state, args, kwargs, dispatcher)
    state.runs_as, state.reason = recipe, reason
    if reason is not None:
        log_once(base, recipe, reason)
    if y is None:
        return original(module, *args, **kwargs)
    if isinstance(plan, StemPlan) and plan.goes_on:
        return original(AfterStem(module, [part.path for part in plan.parts], y), args[0])
    return y


def unit(modules: dict[str, Any], names: ConvBNNames) -> ConvBN:
    bn = modules[names.bn]
    if names.frozen:
        bn = FrozenNorm(bn, names.eps)
    return ConvBN(modules[names.conv], bn, names.relu)


def attempt(
    module: nn.Module,
    state: BlockState,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ops_for: Callable[[str], Ops],
) -> Outcome:
    """The call's outcome; what is cheap to find out comes first. ops_for: from a backend's name, what runs it."""
    if state.recipe == UNFUSED:
        return AS_ASKED
    if (reason := guards.unfit_call(args, kwargs)) is not None:
        return Outcome(UNFUSED, reason)
    x, plan = args[0], state.plan
    if never_fused(state.recipe, x, state.channels, ops_for is opaque_backend):
        return NO_FASTER_RECIPE
    if (reason := guards.transformed() or guards.unfit_input(x, isinstance(plan, StemPlan))) is not None:
        return Outcome(UNFUSED, reason)
    ops, dtype = ops_for(state.backend), compute_dtype(x)
    base = base_class(module)
    if getattr(type(module), ORIGINAL) is not getattr(base, plan.method):
        return Outcome(UNFUSED, f"forward_replaced:{base.__qualname__}.{plan.method}")
    if (reason := method_replaced(plan)) is not None:
        return Outcome(UNFUSED, reason)
    compiling = ops_for is opaque_backend
    if isinstance(plan, StemPlan) and not plan.whole:
        modules = resolve_stem(module, plan, state.harmless, compiling)
    else:
        modules = resolve(module, plan.structure, state.harmless, compiling)
    if isinstance(modules, str):
        return Outcome(UNFUSED, modules)
    units = [unit(modules, names) for names in plan.units]
    if (reason := guards.unreadable(units, plan)) is not None:
        return Outcome(UNFUSED, reason)
    return fused(plan, state.recipe, ops, modules, units, x if x.dtype is dtype else x.to(dtype))


def fused(
    plan: Plan, requested: str, ops: Ops, modules: dict[str, Any], units: list[ConvBN], x: Tensor
) -> Outcome:
    """The outcome once the modules are known to be those of the plan; x in the dtype of the convolutions."""
    main, shortcut = (units, None) if plan.projection is None else (units[:-1], units[-1])
    try:
        data = read_block(x, main, shortcut, plan.shortcut is Shortcut.IDENTITY)
    except UnusualNumberError as error:
        return Outcome(UNFUSED, error.code)
    others = modules.values() if isinstance(plan, BlockPlan) and plan.shortcut_paths else ()
    if (reason := guards.unfit_block(data, plan) or shared_statistics(data, others, plan)) is not None:
        return Outcome(UNFUSED, reason)
    if isinstance(plan, StemPlan) and plan.pool is not None:
        pool = modules[plan.pool] if isinstance(plan.pool, str) else nn.MaxPool2d(*plan.pool)
        if (reason := guards.unfit_pool(data, pool, plan)) is not None:
            return Outcome(UNFUSED, reason)
        recipe, reason = choose_stem(requested, x, ops, wants_gradient(data), data.tensors[0].weight.shape[0])
        if recipe == UNFUSED:
            return Outcome(recipe, reason)
        return Outcome(recipe, reason, stem_block(x, main[0], pool, backend=ops))
    recipe, reason = choose(requested, data.config, data.tensors, x, ops, wants_gradient(data))
    if recipe == UNFUSED:
        return Outcome(recipe, reason)
    if isinstance(plan, BlockPlan) and plan.shortcut_paths:
        residual = reduce(add, [modules[path](x) for path in plan.shortcut_paths])
        return Outcome(recipe, reason, with_residual(data, recipe, ops, residual))
    return Outcome(recipe, reason, run(data, recipe, ops))
