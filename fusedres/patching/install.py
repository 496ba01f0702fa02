"""Installs a plan on a block, or on a model for its stem, by swapping its class, and takes it off again.

The new class is a subclass of the module's own, with its name: parameters, buffers, submodules, hooks, state_dict
keys, isinstance and child order stay; deepcopy and pickle go through `rebuild`. The plan and the last call's outcome
live in one plain attribute of the instance.
"""

from __future__ import annotations

import copyreg
import logging
from dataclasses import dataclass
from functools import cache, reduce, wraps
from operator import add
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.blocks.choice import UNFUSED, choose, choose_stem
from fusedres.blocks.config import Shortcut
from fusedres.dispatch import dispatcher
from fusedres.errors import UnsupportedModelError
from fusedres.nn.residual_block import ConvBN, compute_dtype, read_block, run, wants_gradient
from fusedres.nn.stem import stem_block
from fusedres.patching import guards
from fusedres.patching.norms import frozen_norm
from fusedres.patching.plan import BASE, STATE, BlockPlan, ConvBNNames, Plan, StemPlan
from fusedres.patching.reasons import describe

logger = logging.getLogger("fusedres")


@dataclass
class BlockState:
    """What a patched block carries: its plan, the options of `patch`, and what its last call did."""

    plan: Plan
    recipe: str
    backend: str
    runs_as: str | None = None  # a recipe, once called
    reason: str | None = None  # why runs_as is not what was asked for


@cache
def log_once(class_name: str, recipe: str, code: str) -> None:
    """One line per class, recipe and code in a process; `report` has them per block."""
    logger.info("%s runs %s: %s: %s", class_name, recipe, code.partition(":")[0], describe(code))


class AfterStem:
    """A model as its own method sees it once its stem has run: the stem's first part gives y, the others hand it on."""

    def __init__(self, model: nn.Module, parts: list[str], y: Tensor) -> None:
        self.__dict__.update(dict.fromkeys(parts, lambda x: x), **{parts[0]: lambda x: y}, model=model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)


def conv_bn(block: nn.Module, names: ConvBNNames) -> ConvBN:
    conv, bn = block.get_submodule(names.conv), block.get_submodule(names.bn)
    return ConvBN(conv, frozen_norm(bn, names.eps) if names.frozen else bn, names.relu)  # type: ignore[arg-type]


def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of a patched method: fused if nothing speaks against it, else by the original method."""
    state: BlockState = vars(module)[STATE]
    plan = state.plan
    if torch.compiler.is_compiling():  # Inductor fuses the original; opaque ops would stop it
        return getattr(base_class(module), plan.method)(module, *args, **kwargs)
    reason = guards.refusal(module, plan, args, kwargs)
    recipe, y = UNFUSED, None
    if reason is None:
        fused = fused_stem if isinstance(plan, StemPlan) and plan.pool is not None else fused_block
        recipe, reason, y = fused(module, state, args[0])
    state.runs_as, state.reason = recipe, reason
    if reason is not None:
        log_once(base_class(module).__qualname__, recipe, reason)
    original = getattr(base_class(module), plan.method)
    if recipe == UNFUSED:
        return original(module, *args, **kwargs)
    if isinstance(plan, StemPlan) and plan.goes_on:
        assert y is not None
        return original(AfterStem(module, [path for path, _ in plan.structure], y), args[0])
    return y


def fused_block(block: nn.Module, state: BlockState, x: Tensor) -> tuple[str, str | None, Tensor | None]:
    """The recipe, why it is not the one asked for, and y unless the recipe is `unfused`."""
    plan, ops = state.plan, dispatcher(state.backend)
    main = [conv_bn(block, names) for names in plan.main]
    shortcut = None if plan.projection is None else conv_bn(block, plan.projection)
    x = x.to(compute_dtype(x))
    data = read_block(x, main, shortcut, plan.shortcut is Shortcut.IDENTITY)
    recipe, reason = choose(state.recipe, data.config, data.tensors, x, ops, wants_gradient(data))
    if recipe == UNFUSED:
        return recipe, reason, None
    if isinstance(plan, BlockPlan) and plan.shortcut_paths:
        residual = reduce(add, [block.get_submodule(path)(x) for path in plan.shortcut_paths])
        data = read_block(x, main, residual, False)
    return recipe, reason, run(data, recipe, ops)


def fused_stem(model: nn.Module, state: BlockState, x: Tensor) -> tuple[str, str | None, Tensor | None]:
    """As `fused_block`, for a stem with pooling."""
    plan, ops = state.plan, dispatcher(state.backend)
    assert isinstance(plan, StemPlan)
    unit = conv_bn(model, plan.unit)
    recipe, reason = choose_stem(state.recipe, x, ops, torch.is_grad_enabled())
    if recipe == UNFUSED:
        return recipe, reason, None
    pool = guards.pooling(model, plan)
    assert pool is not None
    return recipe, reason, stem_block(x, unit, pool, backend=ops)


@cache
def patched_class(base: type, method: str) -> Any:
    """The subclass that a module of class `base` is given, with that method replaced."""

    original, fused_or_not = getattr(base, method), call

    def template(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return fused_or_not(self, args, kwargs)

    # torch.jit.script compiles the source of the original, which `wraps` points to, with the names that are global
    # here: they must be the original's
    code, closure = template.__code__, template.__closure__
    replacement = wraps(original)(FunctionType(code, original.__globals__, method, None, closure))

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        made = super(patched, self).__reduce_ex__(protocol)
        if made[0] is copyreg.__newobj__ and made[1] == (patched,):  # type: ignore[attr-defined]
            return (rebuild, (base, method), *made[2:])
        return made

    patched: Any = type(
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": reduce_ex,
            method: replacement,
            BASE: base,
        },
    )
    return patched


def rebuild(base: type, method: str) -> nn.Module:
    """An empty module of the patched class; copy and pickle fill in its state."""
    cls = patched_class(base, method)
    return cls.__new__(cls)


def is_patched_block(module: nn.Module) -> bool:
    return STATE in vars(module) and hasattr(type(module), BASE)


def base_class(module: nn.Module) -> Any:
    """The class a module had before `install`; its own where it has none of ours."""
    return getattr(type(module), BASE, type(module))


def install(block: nn.Module, state: BlockState) -> None:
    block.__dict__[STATE] = state
    block.__class__ = patched_class(base_class(block), state.plan.method)


def check_removable(name: str, block: nn.Module) -> None:
    """Raises UnsupportedModelError if another tool swapped the class again, on top of ours."""
    if BASE not in vars(type(block)):
        raise UnsupportedModelError(
            f"fusedres.unpatch: {name or 'the model'} has class {type(block).__module__}."
            f"{type(block).__qualname__}, put over the patched class by another tool; undo that first."
        )


def remove(block: nn.Module) -> None:
    """Restores the class; `check_removable` must have passed."""
    block.__class__ = base_class(block)
    del block.__dict__[STATE]
