"""Installs a plan on a block by swapping its class, and takes it off again.

The new class is a subclass of the block's own, with its name: parameters, buffers, submodules, hooks, state_dict
keys, isinstance and child order stay; deepcopy and pickle go through `rebuild`. The plan and the last call's outcome
live in one plain attribute of the instance.
"""

from __future__ import annotations

import copyreg
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.blocks.choice import UNFUSED, choose
from fusedres.blocks.config import Shortcut
from fusedres.dispatch import dispatcher
from fusedres.errors import UnsupportedModelError
from fusedres.nn.residual_block import ConvBN, read_block, run, wants_gradient
from fusedres.patching import guards
from fusedres.patching.plan import BlockPlan, ConvBNNames

STATE = "_fusedres"
BASE = "__fusedres_base__"


@dataclass
class BlockState:
    """What a patched block carries: its plan, the options of `patch`, and what its last call did."""

    plan: BlockPlan
    recipe: str
    backend: str
    runs_as: str | None = None  # a recipe, once called
    reason: str | None = None  # why runs_as is not what was asked for


def conv_bn(block: nn.Module, names: ConvBNNames) -> ConvBN:
    return ConvBN(block.get_submodule(names.conv), block.get_submodule(names.bn), names.relu)  # type: ignore[arg-type]


def call(block: nn.Module, state: BlockState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One forward of a patched block: fused if nothing speaks against it, else by the original forward."""
    recipe, reason = UNFUSED, guards.refusal(block, state.plan, args, kwargs)
    if reason is None:
        plan, x = state.plan, args[0]
        ops = dispatcher(state.backend)
        shortcut: ConvBN | Tensor | None = None
        if plan.projection is not None:
            shortcut = conv_bn(block, plan.projection)
        main = [conv_bn(block, names) for names in plan.main]
        data = read_block(x, main, shortcut, plan.shortcut is Shortcut.IDENTITY)
        recipe, reason = choose(state.recipe, data.config, data.tensors, x, ops, wants_gradient(data))
        if recipe != UNFUSED and plan.shortcut_path is not None:
            residual = block.get_submodule(plan.shortcut_path)(x)
            data = read_block(x, main, residual, False)
    if not torch.compiler.is_compiling():
        state.runs_as, state.reason = recipe, reason
    if recipe == UNFUSED:
        return base_class(block).forward(block, *args, **kwargs)
    return run(data, recipe, ops)


@cache
def patched_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass that a block of class `base` is given."""

    @wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(self, vars(self)[STATE], args, kwargs)

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        made = super(patched, self).__reduce_ex__(protocol)
        if made[0] is copyreg.__newobj__ and made[1] == (patched,):  # type: ignore[attr-defined]
            return (rebuild, (base,), *made[2:])
        return made

    patched = type(
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": reduce_ex,
            "forward": forward,
            BASE: base,
        },
    )
    return patched


def rebuild(base: type[nn.Module]) -> nn.Module:
    """An empty block of the patched class; copy and pickle fill in its state."""
    cls = patched_class(base)
    return cls.__new__(cls)


def is_patched_block(module: nn.Module) -> bool:
    return STATE in vars(module) and hasattr(type(module), BASE)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before `install`; its own where it has none of ours."""
    return getattr(type(module), BASE, type(module))


def install(block: nn.Module, state: BlockState) -> None:
    block.__dict__[STATE] = state
    block.__class__ = patched_class(base_class(block))


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
