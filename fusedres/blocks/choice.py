"""Which recipe a block runs as: the user's table, then the measured one, and what to do where they are silent.

A request for a recipe that the block's form does not have falls to the next one, with a reason code. "auto" takes
what the table names for the fastest backend that would serve the call, and `unfused`, the original forward, where
nothing is known to be faster.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.blocks import RECIPES, gram, user_table
from fusedres.blocks.config import BlockConfig, ConvBNTensors
from fusedres.dispatch import Dispatcher

AUTO = "auto"
UNFUSED = user_table.UNFUSED
RECIPE_NAMES = (AUTO, UNFUSED, *RECIPES)


class Measured(NamedTuple):
    """One entry of the table: a recipe, and where it was found to be the fastest."""

    recipe: str
    where: str


# (device type, backend, dtype, gradients wanted) -> entry
TABLE: dict[tuple[str, str, torch.dtype, bool], Measured] = {}


class Choice(NamedTuple):
    """The recipe to run, and a reason code where it is not the one asked for."""

    recipe: str
    reason: str | None


def check_recipe(name: str) -> None:
    """Raises ValueError unless `name` is one of RECIPE_NAMES."""
    if name not in RECIPE_NAMES:
        raise ValueError(f"fusedres: recipe {name!r} is unknown, choose from {', '.join(RECIPE_NAMES)}")


def choose(
    requested: str,
    config: BlockConfig,
    units: tuple[ConvBNTensors, ...],
    x: Tensor,
    ops: Dispatcher,
    gradients: bool,
) -> Choice:
    """The recipe for one call, from what was requested and the block's form."""
    wanted: str | None = requested
    if requested == AUTO:
        users = user_table.block_recipe(x, config, units, ops, gradients)
        wanted = users or measured(x, config.dtype, ops, gradients)
    if wanted is None or (requested == AUTO and wanted == UNFUSED):
        return Choice(UNFUSED, "no_faster_recipe")
    if wanted == "gram" and (reason := gram.unsuitable(config, units)) is not None:
        return Choice("separate", reason)
    return Choice(wanted, None)


def choose_stem(requested: str, x: Tensor, ops: Dispatcher, gradients: bool) -> Choice:
    """The same for a stem, which has one fused form: `separate`."""
    wanted: str | None = requested
    if requested == AUTO:
        wanted = user_table.stem_recipe(x, ops, gradients) or measured(x, x.dtype, ops, gradients)
    if wanted is None or (requested == AUTO and wanted == UNFUSED):
        return Choice(UNFUSED, "no_faster_recipe")
    return Choice("separate", "no_1x1_expansion") if wanted == "gram" else Choice(wanted, None)


def measured(x: Tensor, dtype: torch.dtype, ops: Dispatcher, gradients: bool) -> str | None:
    """What the table names for calls on tensors like x, or None."""
    entry = TABLE.get((x.device.type, ops.serving("bn_stats", x), dtype, gradients))
    return None if entry is None else entry.recipe
