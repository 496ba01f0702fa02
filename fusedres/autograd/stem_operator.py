"""The stem of a ResNet as operators of torch with an autograd formula; see `fusedres.autograd.operator`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres.autograd.function import PARAMETERS, memory_format, without_autocast
from fusedres.autograd.graph_task import taken
from fusedres.autograd.operator import FAKE, unit_config, unit_ints, without_statistics
from fusedres.blocks import stem
from fusedres.blocks.config import ConvBNNeeds, ConvBNTensors, own_statistics
from fusedres.blocks.stem import StemConfig, StemSaved
from fusedres.ops.contract import BatchNormVectors
from fusedres.ops.dispatch import Dispatcher, dispatcher

CONSTANTS = "bool[] present, SymInt[] unit, float eps, SymInt[] pool, str backend"


def config_of(unit: list[int], eps: float, pool: list[int]) -> StemConfig:
    return StemConfig(unit_config(unit, eps), *pool)


def tensors_of(given: list[Tensor], present: list[bool]) -> ConvBNTensors:
    left = iter(given)
    return ConvBNTensors(*(next(left) if here else None for here in present))  # type: ignore[arg-type]


def run_forward(
    ops: Dispatcher, x: Tensor, given: list[Tensor], present: list[bool], config: StemConfig
) -> list[Tensor]:
    """y, and what backward needs: c, the BN's vectors, indices."""
    with without_autocast(x.device.type):
        y, saved = stem.forward(ops, config, x, own_statistics(tensors_of(given, present)))
    assert saved.indices is not None
    return [y, saved.c, *saved.vectors, saved.indices]


def run_backward(
    ops: Dispatcher,
    dy: Tensor,
    x: Tensor,
    t: ConvBNTensors,
    saved: list[Tensor],
    needs: list[bool],
    config: StemConfig,
) -> list[Tensor]:
    """The gradients that `needs` names: of x and the parameters."""
    c, *vectors, indices = saved
    with without_autocast(x.device.type):
        dx, unit = stem.backward(
            ops,
            config,
            x,
            t,
            StemSaved(c, BatchNormVectors(*vectors), indices),
            dy,
            ConvBNNeeds(*needs[1:]),
            needs[0],
        )
    return [g for g, wanted in zip((dx, *unit), needs, strict=True) if wanted]  # type: ignore[misc]


@torch.library.custom_op(
    "fusedres::stem_forward", mutates_args=(), schema=f"(Tensor x, Tensor[] tensors, {CONSTANTS}) -> Tensor[]"
)
def stem_forward(x: Tensor, given: list[Tensor], present: list[bool], *rest: Any) -> Any:
    *constants, backend = rest
    return run_forward(dispatcher(backend), x, given, present, config_of(*constants))


@stem_forward.register_fake
def _(x: Tensor, given: list[Tensor], present: list[bool], *rest: Any) -> list[Tensor]:
    return run_forward(FAKE, x, given, present, config_of(*rest[:-1]))


@torch.library.custom_op(
    "fusedres::stem_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor[] tensors, Tensor[] saved, bool[] needs, bool channels_last, "
    f"{CONSTANTS}) -> Tensor[]",
)
def stem_backward(*args: Any) -> Any:
    return backward_of(dispatcher(args[-1]), *args[:-1])


@stem_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    return backward_of(FAKE, *args[:-1])


def backward_of(
    ops: Dispatcher,
    dy: Tensor,
    x: Tensor,
    given: list[Tensor],
    saved: list[Tensor],
    needs: list[bool],
    channels_last: bool,
    *constants: Any,
) -> list[Tensor]:
    present, *rest = constants
    dy = dy.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return run_backward(ops, dy, x, tensors_of(given, present), saved, needs, config_of(*rest))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, tensors, given, *constants = inputs
    y, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    parameters, present = without_statistics(tensors, given)
    ctx.save_for_backward(x, *parameters, *saved)
    ctx.given, ctx.parameters, ctx.constants = given, len(parameters), (present, *constants)
    ctx.channels_last = memory_format(y) is torch.channels_last


def backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    wanted_x, wanted, *rest = ctx.needs_input_grad
    dy = grads[0]
    if dy is None:
        return None, [None] * sum(ctx.given), *(None for _ in rest)
    flags = wanted_x, *wanted
    wanted_x, *wanted = taken(ctx, flags, range(len(flags)))
    x, *tensors = ctx.saved_tensors
    left = iter(wanted)
    needs = [here and next(left) for here in ctx.given][:PARAMETERS]
    made = iter(
        torch.ops.fusedres.stem_backward(
            dy,
            x,
            tensors[: ctx.parameters],
            tensors[ctx.parameters :],
            [wanted_x, *needs],
            ctx.channels_last,
            *ctx.constants,
        )
    )
    dx = next(made) if wanted_x else None
    return dx, [next(made) if flag else None for flag in wanted], *(None for _ in rest)


stem_forward.register_autograd(backward, setup_context=setup_context)


def stem_operator(
    x: Tensor, config: StemConfig, tensors: ConvBNTensors, backend: str
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """y, and mean and var of the BN: the stem by its operator, for a graph being compiled."""
    given = [t for t in tensors if t is not None]
    present = [t is not None for t in tensors]
    outputs = torch.ops.fusedres.stem_forward(
        x, given, present, unit_ints(config.unit), config.unit.eps, list(config.pool), backend
    )
    return outputs[0], (outputs[2], outputs[3])
