"""A residual block, or a stem, as operators of torch with an autograd formula: how a compiled graph runs it.

    outputs = torch.ops.fusedres.residual_block_forward(x, residual, tensors, ...)
    grads = torch.ops.fusedres.residual_block_backward(dy, x, tensors, saved, ...)

One operator per direction, with the recipe run inside as eager runs it: same kernels, same roundings, and the
overhead of an operator (about 35 us on a CPU) once a block instead of once a raw op. What a compiler could fuse
further lies between blocks, or in the running statistics, which are moved outside. A constant of a call is an
operator's argument: `BlockConstants`, flattened. Lists hold the tensors that are present, in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.autograd.bound import FIELDS
from fusedres.autograd.function import memory_format
from fusedres.autograd.graph_task import taken
from fusedres.autograd.passes import as_units
from fusedres.blocks import RECIPES
from fusedres.blocks.config import (
    BlockConfig,
    BlockNeeds,
    ConvBNConfig,
    ConvBNNeeds,
    ConvBNTensors,
    Saved,
    Shortcut,
    Window,
    own_statistics,
)
from fusedres.ops import fake
from fusedres.ops.autocast import without_autocast
from fusedres.ops.contract import BatchNormVectors
from fusedres.ops.dispatch import Dispatcher, dispatcher

FAKE = Dispatcher((fake.FAKE,))
PARAMETERS = len(ConvBNNeeds._fields)
ABSENT = (0, 0, 0)  # the shape that stands for no tensor: none that is kept has three dimensions
UNIT_INTS = 9  # stride, padding, dilation: two each; groups; training; relu
CONSTANTS = (
    "bool[] present, SymInt[] units, float[] eps, SymInt[]? pool, str shortcut, ScalarType dtype, str recipe, "
    "str backend"
)


def unit_ints(unit: ConvBNConfig) -> list[int]:
    """All of it but eps."""
    return [*unit.stride, *unit.padding, *unit.dilation, unit.groups, int(unit.training), int(unit.relu)]


def unit_config(ints: list[int], eps: float) -> ConvBNConfig:
    """The inverse of `unit_ints`."""
    *sizes, groups, training, relu = ints
    stride, padding, dilation = ((sizes[i], sizes[i + 1]) for i in (0, 2, 4))
    return ConvBNConfig(stride, padding, dilation, groups, eps, bool(training), bool(relu))


class BlockConstants(NamedTuple):
    """What is constant in a call, as an operator's arguments.

    present: for each field of each unit's ConvBNTensors, whether it is given; units: UNIT_INTS numbers each; pool: a
    stem's Window, else None.
    """

    present: list[bool]
    units: list[int]
    eps: list[float]
    pool: list[int] | None
    shortcut: str
    dtype: torch.dtype
    recipe: str
    backend: str

    @property
    def config(self) -> BlockConfig:
        units = []
        for i, eps in enumerate(self.eps):
            units.append(unit_config(self.units[i * UNIT_INTS : (i + 1) * UNIT_INTS], eps))
        shortcut = Shortcut(self.shortcut)
        projection = units.pop() if shortcut is Shortcut.PROJECTION else None
        pool = None if self.pool is None else Window(*self.pool)
        return BlockConfig(tuple(units), shortcut, projection, self.dtype, pool)

    def tensors(self, given: list[Tensor]) -> tuple[ConvBNTensors, ...]:
        """The units' tensors, from those that are present."""
        left = iter(given)
        return as_units(tuple(next(left) if here else None for here in self.present))


def block_constants(
    config: BlockConfig, tensors: tuple[ConvBNTensors, ...], recipe: str, backend: str
) -> BlockConstants:
    """Written so that Dynamo can trace it."""
    units = [n for unit in config.units for n in unit_ints(unit)]
    present = [t is not None for unit in tensors for t in unit]
    eps = [unit.eps for unit in config.units]
    pool = None if config.pool is None else list(config.pool)
    return BlockConstants(present, units, eps, pool, config.shortcut.value, config.dtype, recipe, backend)


class Kept(NamedTuple):
    """Where the tensors of a `Saved` stand in the forward operator's result, after y."""

    activations: int
    units: int

    def vector(self, unit: int, field: str) -> int:
        """Index of one of a unit's BN vectors in the result."""
        fields = BatchNormVectors._fields
        return 1 + self.activations + self.units + unit * len(fields) + fields.index(field)


def kept(main: int, units: int, recipe: str) -> Kept:
    """For a block with so many units on its main path, and in all."""
    return Kept(main - 1 if RECIPES[recipe].KEEPS_ACTIVATIONS else 0, units)


def run_forward(
    ops: Dispatcher,
    x: Tensor,
    residual: Tensor | None,
    tensors: list[Tensor],
    constants: BlockConstants,
    save: bool,
) -> list[Tensor]:
    """y and, with `save`, the flattened `Saved`, else each unit's mean and var of the batch.

    A tensor of shape ABSENT stands for what is absent: without elements, so two runs return the same.
    """
    config, units = constants.config, constants.tensors(tensors)
    if save:  # an operator must not return what it was given
        units = tuple(own_statistics(t) for t in units)
    with without_autocast(x.device.type):
        out = RECIPES[constants.recipe].forward(ops, config, x, residual, units, save)
        if out.saved is None:
            seen = zip(config.units, out.vectors, strict=True)
            held = [t for unit, v in seen for t in ((v.mean, v.var) if unit.training else (None, None))]
        else:
            stored = RECIPES[constants.recipe].kept_activations(config, units, out.saved.activations)
            # weights are cast again in backward
            held = [*out.saved._replace(activations=stored, weights=()).flatten()]
        return [out.y, *(x.new_empty(ABSENT) if t is None else t for t in held)]


def run_backward(
    ops: Dispatcher,
    dy: Tensor,
    x: Tensor,
    tensors: list[Tensor],
    saved: list[Tensor],
    needs: list[bool],
    channels_last: bool,
    constants: BlockConstants,
) -> list[Tensor]:
    """The gradients that `needs` names: of x, the residual, and each unit's parameters."""
    config = constants.config
    layout = torch.channels_last if channels_last else torch.contiguous_format
    held = tuple(None if t.dim() == len(ABSENT) else t for t in saved)
    units = tuple(ConvBNNeeds(*needs[i : i + PARAMETERS]) for i in range(2, len(needs), PARAMETERS))
    with without_autocast(x.device.type):
        grads = RECIPES[constants.recipe].backward(
            ops,
            config,
            x,
            constants.tensors(tensors),
            Saved.unflatten(held, (*kept(len(config.main), len(config.units), constants.recipe), 0)),
            dy.contiguous(memory_format=layout),
            BlockNeeds(needs[0], needs[1], units),
        )
    flat = (grads.x, grads.residual, *(g for unit in grads.units for g in unit))
    return [g for g, wanted in zip(flat, needs, strict=True) if wanted]  # type: ignore[misc]


@torch.library.custom_op(
    "fusedres::residual_block_forward",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? residual, Tensor[] tensors, {CONSTANTS}, bool save) -> Tensor[]",
)
def residual_block_forward(x: Tensor, residual: Tensor | None, tensors: list[Tensor], *rest: Any) -> Any:
    constants, save = BlockConstants(*rest[:-1]), rest[-1]
    return run_forward(dispatcher(constants.backend), x, residual, tensors, constants, save)


@residual_block_forward.register_fake
def _(x: Tensor, residual: Tensor | None, tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    return run_forward(FAKE, x, residual, tensors, BlockConstants(*rest[:-1]), rest[-1])


@torch.library.custom_op(
    "fusedres::residual_block_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor[] tensors, Tensor[] saved, bool[] needs, bool channels_last, "
    f"{CONSTANTS}) -> Tensor[]",
)
def residual_block_backward(dy: Tensor, x: Tensor, *rest: Any) -> Any:
    tensors, saved, needs, channels_last, *given = rest
    constants = BlockConstants(*given)
    ops = dispatcher(constants.backend)
    return run_backward(ops, dy, x, tensors, saved, needs, channels_last, constants)


@residual_block_backward.register_fake
def _(dy: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    tensors, saved, needs, channels_last, *constants = rest
    return run_backward(FAKE, dy, x, tensors, saved, needs, channels_last, BlockConstants(*constants))


def without_statistics(given: list[Tensor], present: list[bool]) -> tuple[list[Tensor], list[bool]]:
    """The tensors of units that backward reads: it has BN's vectors, and a later call may move the statistics."""
    parameter = [i % FIELDS < PARAMETERS for i in range(len(present))]
    places = (i for i, here in enumerate(present) if here)
    kept = [t for i, t in zip(places, given, strict=True) if parameter[i]]
    return kept, [here and parameter[i] for i, here in enumerate(present)]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, _, tensors, *rest, _ = inputs
    y, *saved = output
    constants = BlockConstants(*rest)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    parameters, present = without_statistics(tensors, constants.present)
    ctx.save_for_backward(x, *parameters, *saved)
    ctx.given, ctx.parameters = constants.present, len(parameters)
    ctx.constants = constants._replace(present=present)
    ctx.channels_last = memory_format(y) is torch.channels_last


def backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    constants: BlockConstants = ctx.constants
    wanted_x, wanted_residual, wanted, *rest = ctx.needs_input_grad
    dy = grads[0]
    if dy is None:
        return None, None, [None] * sum(ctx.given), *(None for _ in rest)
    flags = wanted_x, wanted_residual, *wanted
    given = (i for i in range(len(flags)) if i != 1 or constants.shortcut == Shortcut.TENSOR.value)
    wanted_x, wanted_residual, *wanted = taken(ctx, flags, enumerate(given))
    x, *tensors = ctx.saved_tensors
    tensors, saved = tensors[: ctx.parameters], tensors[ctx.parameters :]
    left = iter(wanted)
    by_field = [here and next(left) for here in ctx.given]
    starts = range(0, len(by_field), FIELDS)
    needs = [wanted_x, wanted_residual, *(f for i in starts for f in by_field[i : i + PARAMETERS])]
    made = iter(
        torch.ops.fusedres.residual_block_backward(
            dy, x, tensors, saved, needs, ctx.channels_last, *constants
        )
    )
    dx, dresidual = (next(made) if flag else None for flag in needs[:2])
    return dx, dresidual, [next(made) if flag else None for flag in wanted], *(None for _ in rest)


residual_block_forward.register_autograd(backward, setup_context=setup_context)


def residual_block_operator(
    x: Tensor,
    residual: Tensor | None,
    tensors: tuple[ConvBNTensors, ...],
    constants: BlockConstants,
    gradients: bool,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """y, and mean and var of each BN: the block by its operator, for a graph being compiled."""
    given = [t for unit in tensors for t in unit if t is not None]
    outputs = torch.ops.fusedres.residual_block_forward(x, residual, given, *constants, gradients)
    if not gradients:
        return outputs[0], [(outputs[i], outputs[i + 1]) for i in range(1, len(outputs), 2)]
    units = len(constants.eps)
    main = units - 1 if constants.shortcut == Shortcut.PROJECTION.value else units
    where = kept(main, units, constants.recipe)
    places = [(where.vector(i, "mean"), where.vector(i, "var")) for i in range(units)]
    return outputs[0], [(outputs[i], outputs[j]) for i, j in places]
