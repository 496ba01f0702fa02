"""Installs a plan on a block, or on a model for its stem, by swapping its class, and takes it off again.

The new class is a subclass of the module's own, with its name: parameters, buffers, submodules, hooks, state_dict
keys, isinstance and child order stay; deepcopy and pickle go through `rebuild`. The plan and the last call's outcome
live in one plain attribute of the instance.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from fusedres.errors import UnsupportedModelError
from fusedres.modules import shadows
from fusedres.modules.derived_class import BASE, STATE, base_class, set_class
from fusedres.patching import older_pickles as older_pickles  # gives the names in older pickles their meaning
from fusedres.patching.call import call
from fusedres.patching.patched_class import Behaviour, patched_class
from fusedres.patching.reasons import describe
from fusedres.patching.resolve import first_channels
from fusedres.patching.search import plan_again
from fusedres.patching.state import BlockState, is_patched_block
from fusedres.patching.state import restored as restored  # older pickles name it here


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
    state.channels = first_channels(module, found)


def install(block: nn.Module, state: BlockState) -> None:
    cls = patched_class(base_class(block), state.plan.method, BEHAVIOUR)
    if state.plan.method == "forward" and shadows.has_own_forward(block):
        del block.__dict__["forward"]  # calls would pass the patched one by
    block.__dict__.pop(STATE, None)
    block.__dict__[STATE] = state  # the newest attribute of the block
    state.channels = first_channels(block, state.plan)
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
torch.serialization.add_safe_globals([rebuild])  # it calls nothing that a pickle names
