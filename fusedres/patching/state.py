"""What a patched module carries, in one attribute of its own: its plan, the options of `patch`, its last call."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fusedres.matching.plan import Plan
from fusedres.modules import shadows
from fusedres.modules.derived_class import BASE, STATE, base_class
from fusedres.patching.fits import Fits
from fusedres.trials.on_block import OnBlock


@dataclass
class BlockState:
    """What a patched block carries: its plan, the options of `patch`, and what its last call did."""

    plan: Plan
    recipe: str
    backend: str
    channels: int | None = None  # out of the first convolution, as installed; None: they do not count
    runs_as: str | None = None  # a recipe, once called
    reason: str | None = None  # why runs_as is not what was asked for
    harmless: dict[str, tuple[str, int]] = field(default_factory=dict)  # of `resolve`
    warm: set[tuple[Any, ...]] = field(
        default_factory=set
    )  # of `not_warm`: the kinds of calls that ran on a GPU
    fits: Fits = field(default_factory=Fits)
    bound: dict[Any, Any] = field(
        default_factory=dict
    )  # by `bound.key`: calls of which nothing is decided anew
    on_trial: OnBlock = field(default_factory=OnBlock)

    def __copy__(self) -> BlockState:
        return BlockState(**{**vars(self), "fits": Fits(), "bound": {}})

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockState:
        kept = {"warm", "fits", "bound"}  # of backends, and of this block's tensors
        values = {name: value for name, value in vars(self).items() if name not in kept}
        return BlockState(**copy.deepcopy(values, memo), warm=set(self.warm))

    def __reduce__(self) -> tuple[Any, ...]:
        """Plain values alone: a pickle is to load under other versions, and with `weights_only=True`."""
        return restored, (self.recipe, self.backend)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle that holds a plan, as fusedres 0.1 wrote it: plans are found again."""
        self.__init__(None, state["recipe"], state["backend"])  # type: ignore[misc]


def restored(recipe: str, backend: str) -> BlockState:
    """The state of a module that is being loaded; `complete` finds its plan."""
    return BlockState(None, recipe, backend)  # type: ignore[arg-type]


def is_patched_block(module: nn.Module) -> bool:
    return STATE in vars(module) and hasattr(type(module), BASE)


def original_view(module: nn.Module) -> nn.Module:
    """The module as it was before `install`, over the same parts; itself where it is not patched."""
    if not is_patched_block(module):
        return module
    view: nn.Module = object.__new__(base_class(module))
    view.__dict__.update({k: v for k, v in vars(module).items() if k != STATE})
    if shadows.has_own_forward(module):  # it is bound to the module, not to the view
        del view.__dict__["forward"]
    return view


torch.serialization.add_safe_globals([restored])  # it calls nothing that a pickle names
