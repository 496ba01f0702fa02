"""The torch autograd Function of a residual block or a stem: the only place that touches `ctx`.

Forward calls a recipe and saves; backward unpacks and calls it. Under `create_graph=True` backward goes through
`fusedres.blocks.eager` instead, from the inputs, so that second derivatives are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.autograd import passes
from fusedres.autograd.bound import FIXED, Made, given_of, needs_of, places
from fusedres.autograd.graph_task import taken
from fusedres.autograd.passes import as_units
from fusedres.blocks import eager
from fusedres.blocks.config import (
    BlockConfig,
    Saved,
    Shortcut,
    own_statistics,
)
from fusedres.ops.autocast import without_autocast
from fusedres.ops.dispatch import Dispatcher
from fusedres.ops.reference import unpack_mask
from fusedres.recording.bundle import Bundle

FAKE_MODE = torch._C._TorchDispatchModeKey.FAKE


def wants_differentiable(dy: Tensor) -> bool:
    """Whether backward must be made of torch's own operations: for second derivatives, for a batch of gradients
    (`is_grads_batched`, vmap), which is one tensor to those alone, and under FakeTensorMode, which knows no others."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return True
    if torch._C._get_dispatch_mode(FAKE_MODE) is not None:
        return True
    return torch._C._functorch.is_legacy_batchedtensor(dy)


def saved_tensors_have_hooks() -> bool:
    """Whether `torch.autograd.graph.saved_tensors_hooks` see what is saved now, and may keep it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def memory_format(y: Tensor) -> torch.memory_format:
    """The layout that gradients of y are brought into."""
    channels_last = y.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def without_elements(residual: Tensor | None) -> Tensor | None:
    """[0, C, H, W], a function of the residual to autograd, in storage of its own: it keeps no activation alive."""
    if residual is None or not residual.requires_grad:
        return None
    with torch.enable_grad():
        return torch.slice_copy(residual, 0, 0, 0)


class ResidualBlock(torch.autograd.Function):
    """One residual block, or one stem.

    apply(config, recipe, ops, observer, x, residual, *tensors) -> y

    config, recipe, ops: a BlockConfig, a name in RECIPES, the Dispatcher that serves forward and backward.
    observer: moves running statistics; or what was made, where forward has run already.
    x [N, Cin, H, W]; residual like y with Shortcut.TENSOR, else None; tensors: the fields of each
    ConvBNTensors of `config.units`, one after the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        config: BlockConfig,
        recipe: str,
        ops: Dispatcher,
        observer: passes.Observer | Made,
        x: Tensor,
        residual: Tensor | None,
        *flat: Tensor | None,
    ) -> Tensor:
        ctx.held_by_hooks = saved_tensors_have_hooks()
        ctx.bound = None
        if isinstance(observer, Made):
            y, saved, layout, ctx.bound = observer
        else:
            if any(not unit.training for unit in config.units):
                flat = tuple(t for unit in as_units(flat) for t in own_statistics(unit))
            may_bundle = not ctx.held_by_hooks  # hooks are to see all that is kept
            y, saved, layout = passes.forward(
                recipe, ops, config, observer, x, residual, flat, True, keeps=may_bundle
            )
        ctx.bundle = saved if isinstance(saved, Bundle) else None
        ctx.save_for_backward(x, *flat, *(() if isinstance(saved, Bundle) else saved))
        ctx.config, ctx.recipe, ctx.ops = config, recipe, ops
        ctx.layout, ctx.inputs = layout, len(flat)
        ctx.residual = without_elements(residual)
        ctx.memory_format = memory_format(y)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        tensors = ctx.saved_tensors
        x, flat, saved = tensors[0], tensors[1 : 1 + ctx.inputs], ctx.bundle or tensors[1 + ctx.inputs :]
        wanted = asked_of_block(ctx, flat)
        if wants_differentiable(dy):
            mask = Saved.unflatten(tuple(passes.tensors_of(saved)), ctx.layout).mask
            return differentiable_backward(ctx, wanted, x, flat, mask, dy)
        keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        needs = needs_of(tuple(wanted), ctx.held_by_hooks or keep_graph)
        dy = dy.contiguous(memory_format=ctx.memory_format)
        if ctx.bound is not None and isinstance(saved, Bundle):
            grads = ctx.bound.gradients(x, flat, saved, dy, needs)
        else:
            grads = passes.backward(ctx.recipe, ctx.ops, ctx.config, x, flat, saved, ctx.layout, dy, needs)
        if not keep_graph:
            ctx.bundle = None  # as autograd gives back what it has saved
        return None, None, None, None, *grads


apply_directly = super(torch.autograd.Function, ResidualBlock).apply


def applied(*args: Any) -> Tensor:
    """`ResidualBlock.apply(*args)`, without its walk through every argument in Python, which is for transformations by
    torch.func. What is left of one, a wrapper without storage, torch's dispatcher takes away from every operator."""
    if torch._C._are_functorch_transforms_active():
        return ResidualBlock.apply(*args)
    return apply_directly(*args)


def asked_of_block(ctx: Any, flat: tuple[Tensor | None, ...]) -> Sequence[bool]:
    """The flags of `ctx.needs_input_grad` for what the running backward takes; flat: the units' tensors."""
    wanted = ctx.needs_input_grad
    if ctx.bound is not None:
        norms, others = ctx.bound.places
    else:
        norms, others = places(given_of(flat), ctx.config.shortcut is Shortcut.TENSOR)
    asked = taken(ctx, wanted, others)
    if asked[FIXED - 2] or asked[FIXED]:  # a gradient passes every BN on its way to x or to the first weight
        return asked
    return taken(ctx, asked, norms)


def through_relu(
    dy: Tensor, mask: Tensor | None, graph: Sequence[Tensor], layout: torch.memory_format
) -> Tensor:
    """dz [N, C, H, W] by the mask of y. graph: what y is a function of, [N, C, H, W] or without elements; layout: of
    y, which dz takes where dy has none, as the gradient of a sum has none.

    The derivative by y is zero, and torch's ReLU passes it on: whoever differentiates dz alone finds zeros below.
    """
    if mask is None:
        return dy
    keep = unpack_mask(mask, dy).contiguous(memory_format=layout)
    if not graph:
        return torch.where(keep, dy, 0)
    signs = torch.cat([keep.to(dy.dtype), *(t[:0] for t in graph)]).contiguous(memory_format=layout)
    return torch.ops.aten.threshold_backward(dy, signs, 0)


def differentiable_backward(
    ctx: Any,
    asked: Sequence[bool],
    x: Tensor,
    flat: tuple[Tensor | None, ...],
    mask: Tensor | None,
    dy: Tensor,
) -> tuple[Any, ...]:
    """The same gradients as a graph: the block once more by torch's own operations, from its inputs.

    The mask of y is the one of forward, so a residual computed elsewhere is not needed again: its gradient is dz. A
    stem is computed again through its pooling.
    """
    result: list[Tensor | None] = [None] * len(asked)
    inputs = {FIXED - 2: x, **dict(enumerate(flat, FIXED))}
    indices, graph = [i for i in inputs if asked[i]], torch.is_grad_enabled()
    y_of = [] if ctx.residual is None or not graph else [ctx.residual]
    with torch.enable_grad(), without_autocast(x.device.type):
        if indices or (graph and any(ctx.needs_input_grad[i] for i in inputs)):
            z = eager.preactivation(ctx.config, x, as_units(flat))
            y_of += [z] if graph else []
    dz = dy if ctx.config.pool else through_relu(dy, mask, y_of, ctx.memory_format)
    if indices:
        chosen = [inputs[i] for i in indices]
        grads = torch.autograd.grad(z, chosen, dz, create_graph=graph)  # type: ignore[arg-type]
        for i, grad in zip(indices, grads, strict=True):
            result[i] = grad
    if asked[FIXED - 1]:
        result[FIXED - 1] = dz
    return tuple(result)
