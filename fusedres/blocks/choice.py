"""Which recipe a block runs as: the user's table, then the measured one, and what to do where they are silent.

A request for a recipe that the block's form does not have falls to the next one, with a reason code. "auto" takes
what the table names for the fastest backend that would serve the call, and `unfused`, the original forward, where
nothing is known to be faster.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, is_grad_enabled

from fusedres.blocks import RECIPES, gram_form, prologue_form, unfused, user_table
from fusedres.blocks.config import BlockConfig, ConvBNTensors
from fusedres.blocks.unfused import Measured, Table
from fusedres.ops.dispatch import Dispatcher, Ops
from fusedres.ops.native import library
from fusedres.ops.reference import REFERENCE

AUTO = "auto"
UNFUSED = user_table.UNFUSED
RECIPE_NAMES = (AUTO, UNFUSED, *RECIPES)


ZEN4 = "2 cores of an AMD Zen 4, AVX-512 and AVX2, torch 2.13: bench/results/cpu_avx512/README.md"
EMERALD_RAPIDS = "2 cores of an Intel Emerald Rapids, torch 2.13: bench/results/cpu_avx512_amx/README.md"
FLOAT32: Table = {  # against eager, with AVX2 and with AVX-512
    ("cpu", "native", torch.float32, True): (
        Measured("separate", 16_000, 32, ZEN4),
        Measured("separate", 130_000, 16, ZEN4),
    ),
    ("cpu", "native", torch.float32, False): (Measured("separate", 16_000, 16, ZEN4),),
}
BESIDE_WIDER: Table = {  # with AVX2, where oneDNN has vectors twice as wide: narrow blocks leave nothing to save
    ("cpu", "native", torch.float32, True): (Measured("separate", 200_000, 64, EMERALD_RAPIDS),),
    ("cpu", "native", torch.float32, False): (
        Measured("separate", 500_000, 64, EMERALD_RAPIDS),
        Measured("separate", 400_000, 512, EMERALD_RAPIDS),
    ),
}
BFLOAT16: Table = {  # with AVX-512, of a version whose 3x3 convolutions were torch's
    ("cpu", "native", torch.bfloat16, True): (Measured("separate", 800_000, 64, ZEN4),),
    ("cpu", "native", torch.bfloat16, False): (Measured("separate", 1_500_000, 64, ZEN4),),
}


def table_of(instructions: str | None, bfloat16: bool, onednn_is_wider: bool = False) -> Table:
    """The table for kernels of an instruction set, on a processor that multiplies bfloat16, or does not."""
    if instructions is None:
        return {}
    if onednn_is_wider:
        return BESIDE_WIDER
    return {**FLOAT32, **BFLOAT16} if instructions == "avx512" and bfloat16 else FLOAT32


TABLE: Table = table_of(library.instruction_set(), library.multiplies_bfloat16(), library.onednn_is_wider())
MOST_KNOWN = 4096
_known: dict[tuple[Any, ...], str | None] = {}  # what `cause_before_reading` found by the table `_known_of`
_known_of: Table | None = None
_untried_of: Table | None = None
_untried: dict[
    tuple[str, torch.dtype, bool], bool
] = {}  # by device, dtype and whether gradients can be wanted
COMPILED: Table = {}  # inside torch.compile, against what it makes of the original forward


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
    ops: Ops,
    gradients: bool,
) -> Choice:
    """The recipe for one call, from what was requested and the block's form."""
    wanted: str | None = requested
    if requested == AUTO:
        channels = units[0].weight.shape[0]
        wanted = user_table.block_recipe(x, config, units, ops, gradients) if is_eager(ops) else None
        if wanted == UNFUSED:
            return Choice(UNFUSED, "no_faster_recipe")
        wanted = wanted or measured(x, config.dtype, ops, gradients, channels)
    if wanted is None:
        if not is_eager(ops):
            return Choice(UNFUSED, "compiled")
        return Choice(UNFUSED, unfused.cause(TABLE, x, config.dtype, ops, gradients, channels))
    if wanted == "prologue" and (reason := prologue_form.unsuitable(config, units)) is not None:
        return Choice("separate", reason)
    if wanted == "gram" and (reason := gram_form.unsuitable(config, units, x)) is not None:
        return Choice("separate", reason)
    return Choice(wanted, None)


def cause_before_reading(x: Tensor, channels: int | None, compiled: bool) -> str | None:
    """Why a call under "auto" would be given `unfused` whatever its dtype and backend: known before the block is read.

    Every call of a small model pays for this function, so it asks for nothing that it can do without, and remembers.

    Args:
        channels: those out of the first convolution, or None where they do not count.
        compiled: whether the call is traced into a compiled graph.
    """
    if compiled:
        large = COMPILED and unfused.cause_of_size(COMPILED, x, channels, is_grad_enabled()) is None
        return None if large else "compiled"
    if user_table.is_consulted(x.device):
        return None
    global _known_of
    if _known_of is not TABLE or len(_known) > MOST_KNOWN:
        _known.clear()
        _known_of = TABLE
    key = x.numel(), channels, is_grad_enabled(), x.is_cpu or x.device.type, x.dtype
    try:
        return _known[key]
    except KeyError:
        return _known.setdefault(key, unfused.cause_of_size(TABLE, x, channels, key[2]))


def is_untried(x: Tensor, dtype: torch.dtype, ops: Dispatcher, gradients: bool) -> bool:
    """Whether no table of this package is of such calls, though kernels serve them: a trial can tell.

    Args:
        x: the block's input; dtype: of its activations; gradients: whether any is wanted.
    """
    backend = ops.backend_on(x)
    return backend != REFERENCE.name and (x.device.type, backend, dtype, gradients) not in TABLE


def may_be_untried(x: Tensor, with_gradients: bool) -> bool:
    """Whether that can be so, as far as is known before the block is read."""
    global _untried_of
    if _untried_of is not TABLE:
        _untried.clear()
        _untried_of = TABLE
    key = x.device.type, x.dtype, with_gradients
    if key not in _untried:
        kinds = {(device, dtype, gradients) for device, _, dtype, gradients in TABLE}
        _untried[key] = key not in kinds
    return _untried[key]


def is_eager(ops: Ops) -> TypeGuard[Dispatcher]:
    """Whether the call runs now, and is not traced into a compiled graph."""
    return isinstance(ops, Dispatcher)


def table_for(ops: Ops) -> Table:
    """The table that counts for a call that these operators run."""
    return TABLE if is_eager(ops) else COMPILED


def measured(x: Tensor, dtype: torch.dtype, ops: Ops, gradients: bool, channels: int) -> str | None:
    """What the table names for calls on tensors like x and a first convolution to `channels`, or None."""
    entries = table_for(ops).get((x.device.type, ops.backend_on(x), dtype, gradients), ())
    return next((entry.recipe for entry in entries if entry.holds(x.numel(), channels)), None)
