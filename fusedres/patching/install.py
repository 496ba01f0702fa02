"""Installs a plan on a block, or on a model for its stem, by swapping its class, and takes it off again.

The new class is a subclass of the module's own, with its name: parameters, buffers, submodules, hooks, state_dict
keys, isinstance and child order stay; deepcopy and pickle go through `rebuild`. The plan and the last call's outcome
live in one plain attribute of the instance.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fusedres.blocks.choice import UNFUSED, choose, choose_stem, never_fused
from fusedres.blocks.config import Shortcut
from fusedres.errors import UnsupportedModelError
from fusedres.nn.numbers import UnusualNumberError
from fusedres.nn.residual_block import (
    ConvBN,
    compute_dtype,
    read_block,
    run,
    wants_gradient,
    with_residual,
)
from fusedres.nn.stem import stem_block
from fusedres.ops.dispatch import Ops, dispatcher, opaque_backend
from fusedres.patching import guards, shadows, structure
from fusedres.patching.norms import FrozenNorm
from fusedres.patching.patched_class import ORIGINAL, Behaviour, patched_class, set_class
from fusedres.patching.plan import BASE, STATE, BlockPlan, ConvBNNames, Plan, StemPlan
from fusedres.patching.reasons import describe
from fusedres.patching.shared_statistics import shared_statistics

logger = logging.getLogger("fusedres")


@dataclass
class BlockState:
    """What a patched block carries: its plan, the options of `patch`, and what its last call did."""

    plan: Plan
    recipe: str
    backend: str
    channels: int | None = None  # out of the first convolution, as installed; None: they do not count
    runs_as: str | None = None  # a recipe, once called
    reason: str | None = None  # why runs_as is not what was asked for
    harmless: dict[str, tuple[str, int]] = field(default_factory=dict)  # of `structure.resolve`

    def __copy__(self) -> BlockState:
        return BlockState(**vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockState:
        return BlockState(**copy.deepcopy(vars(self), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        """Plain values alone: a pickle is to load under other versions, and with `weights_only=True`."""
        return restored, (self.recipe, self.backend)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle that holds a plan, as fusedres 0.1 wrote it: plans are found again."""
        self.__init__(None, state["recipe"], state["backend"])  # type: ignore[misc]


@cache
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
    if (reason := structure.method_replaced(plan)) is not None:
        return Outcome(UNFUSED, reason)
    compiling = ops_for is opaque_backend
    if isinstance(plan, StemPlan) and not plan.whole:
        modules = structure.resolve_stem(module, plan, state.harmless, compiling)
    else:
        modules = structure.resolve(module, plan.structure, state.harmless, compiling)
    if isinstance(modules, str):
        return Outcome(UNFUSED, modules)
    units = [unit(modules, names) for names in plan.units]
    if (reason := guards.unreadable(units)) is not None:
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
    if (reason := guards.unfit_block(data) or shared_statistics(data, others)) is not None:
        return Outcome(UNFUSED, reason)
    if isinstance(plan, StemPlan) and plan.pool is not None:
        pool = modules[plan.pool] if isinstance(plan.pool, str) else nn.MaxPool2d(*plan.pool)
        if (reason := guards.unfit_pool(data, pool)) is not None:
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


def rebuild(base: type, method: str) -> nn.Module:
    """An empty module of the patched class; copy and pickle fill in its state.

    Raises:
        TypeError: `base` is no class of modules; only a damaged or forged pickle asks for another.
    """
    if not (isinstance(base, type) and issubclass(base, nn.Module)):
        raise TypeError(
            f"fusedres: a pickle asks for a patched {base!r}; it needs a class of modules. Save it again."
        )
    cls = patched_class(base, method, BEHAVIOUR)
    return object.__new__(cls)


def complete(module: nn.Module, method: str) -> None:
    """Finds the plan of a module that was pickled while patched, again: a pickle holds none.

    Where there is none any more, the module is as if unpatched, and a warning says why.
    """
    state: BlockState | None = vars(module).get(STATE)
    if state is None or state.plan is not None:
        return
    from fusedres.patching.search import plan_again  # the search is built on this module

    found = plan_again(module, method)
    if isinstance(found, str):
        remove(module)
        warnings.warn(
            f"fusedres: a {type(module).__name__} was pickled while patched, and cannot be patched here: "
            f"{describe(found)} [{found}]. It runs as unpatched.",
            stacklevel=3,
        )
        return
    state.plan = found
    state.channels = structure.first_channels(module, found)


def restored(recipe: str, backend: str) -> BlockState:
    """The state of a module that is being loaded; `complete` finds its plan."""
    return BlockState(None, recipe, backend)  # type: ignore[arg-type]


def is_patched_block(module: nn.Module) -> bool:
    return STATE in vars(module) and hasattr(type(module), BASE)


def base_class(module: nn.Module) -> Any:
    """The class a module had before `install`; its own where it has none of ours."""
    return getattr(type(module), BASE, type(module))


def original_view(module: nn.Module) -> nn.Module:
    """The module as it was before `install`, over the same parts; itself where it is not patched."""
    if not is_patched_block(module):
        return module
    view: nn.Module = object.__new__(base_class(module))
    view.__dict__.update({k: v for k, v in vars(module).items() if k != STATE})
    if shadows.has_own_forward(module):  # it is bound to the module, not to the view
        del view.__dict__["forward"]
    return view


def install(block: nn.Module, state: BlockState) -> None:
    cls = patched_class(base_class(block), state.plan.method, BEHAVIOUR)
    if state.plan.method == "forward" and shadows.has_own_forward(block):
        del block.__dict__["forward"]  # calls would pass the patched one by
    block.__dict__.pop(STATE, None)
    block.__dict__[STATE] = state  # the newest attribute of the block
    state.channels = structure.first_channels(block, state.plan)
    set_class(block, cls)


def install_all(modules: list[tuple[nn.Module, BlockState | None]]) -> None:
    """Installs each state, or takes off what is installed where it is None: all of them, or after an error none."""
    before = [(module, type(module), vars(module).copy()) for module, _ in modules]
    try:
        for module, state in modules:
            if state is not None:
                install(module, state)
            elif is_patched_block(module):
                remove(module)
    except BaseException:
        for module, cls, attributes in before:
            set_class(module, cls)
            vars(module).clear()
            vars(module).update(attributes)
        raise


def check_removable(name: str, block: nn.Module) -> None:
    """Raises UnsupportedModelError if another tool swapped the class again, on top of ours."""
    if BASE not in vars(type(block)):
        raise UnsupportedModelError(
            f"fusedres.unpatch: {name or 'the model'} has class {type(block).__module__}."
            f"{type(block).__qualname__}, put over the patched class by another tool; undo that first."
        )


def remove(block: nn.Module) -> None:
    """Restores the class; `check_removable` must have passed."""
    set_class(block, base_class(block))
    block.__dict__.pop(STATE, None)


BEHAVIOUR = Behaviour(call, rebuild, complete)
torch.serialization.add_safe_globals([rebuild, restored])  # they call nothing that a pickle names
