"""A residual block over torch's own modules: reads them, runs a recipe, moves the running statistics.

The modules are read anew in every call: their parameters, modes and attributes may change between calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedres.autograd import ResidualBlock, batch_statistics, without_autocast
from fusedres.blocks import RECIPES
from fusedres.blocks.choice import UNFUSED, Choice, choose
from fusedres.blocks.config import BlockConfig, ConvBNConfig, ConvBNTensors, Shortcut, output_size
from fusedres.dispatch import AUTO, Dispatcher, dispatcher
from fusedres.nn.running_stats import update_running_stats, uses_batch_statistics


class ConvBN(NamedTuple):
    """A convolution, its BN, and whether a ReLU follows (in the last of a block: after the addition)."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    relu: bool


class BlockCall(NamedTuple):
    """Everything one call needs, read from the modules."""

    config: BlockConfig
    tensors: tuple[ConvBNTensors, ...]  # as config.units
    norms: tuple[nn.BatchNorm2d, ...]  # as config.units
    x: Tensor
    residual: Tensor | None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which convolutions run on x: autocast's, where it is on and casts x, else x's."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype


def read_conv_bn(unit: ConvBN) -> tuple[ConvBNConfig, ConvBNTensors]:
    conv, bn, relu = unit
    training = uses_batch_statistics(bn)
    config = ConvBNConfig(
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        bn.eps,
        training,
        relu,
    )
    frozen = (None, None) if training else (bn.running_mean, bn.running_var)
    return config, ConvBNTensors(conv.weight, conv.bias, bn.weight, bn.bias, *frozen)


def read_block(
    x: Tensor,
    main: Sequence[ConvBN],
    shortcut: ConvBN | Tensor | None,
    identity: bool,
) -> BlockCall:
    """One call's data from the block's modules; under autocast in its dtype."""
    dtype = compute_dtype(x)
    configs, tensors = zip(*(read_conv_bn(unit) for unit in main), strict=True)
    norms = tuple(unit.bn for unit in main)
    projection = residual = None
    kind = Shortcut.IDENTITY if identity else Shortcut.NONE
    if isinstance(shortcut, Tensor):
        kind, residual = Shortcut.TENSOR, shortcut
    elif shortcut is not None:
        kind = Shortcut.PROJECTION
        projection, shortcut_tensors = read_conv_bn(shortcut)
        tensors, norms = (*tensors, shortcut_tensors), (*norms, shortcut.bn)
    return BlockCall(BlockConfig(configs, kind, projection, dtype), tensors, norms, x, residual)


def wants_gradient(call: BlockCall) -> bool:
    if not torch.is_grad_enabled():
        return False
    tensors = (call.x, call.residual, *(t for unit in call.tensors for t in unit))
    return any(t is not None and t.requires_grad for t in tensors)


def run(call: BlockCall, recipe: str, ops: Dispatcher) -> Tensor:
    """y of the block, by that recipe; running statistics are updated."""
    config, tensors, norms, x, residual = call
    if wants_gradient(call):
        flat = [t for unit in tensors for t in unit]
        y, *stats = ResidualBlock.apply(config, recipe, ops, x, residual, *flat)
    else:
        with torch.no_grad(), without_autocast(x.device.type):
            out = RECIPES[recipe].forward(ops, config, x, residual, tensors, False)
        y, stats = out.y, batch_statistics(config, out.vectors)
    moments = iter(stats)
    for i, (unit, bn) in enumerate(zip(config.units, norms, strict=True)):
        if unit.training:
            update_running_stats(bn, next(moments), next(moments), unit_rows(call, y, i))
    return y


def unit_rows(call: BlockCall, y: Tensor, index: int) -> int:
    """P of the unit's output: spatial sizes follow from x through the strides of the main path."""
    config = call.config
    if config.projection is not None and index == len(config.main):
        return y.shape[0] * y.shape[2] * y.shape[3]
    size = (call.x.shape[2], call.x.shape[3])
    for unit, t in zip(config.main[: index + 1], call.tensors, strict=False):
        kernel = (t.weight.shape[2], t.weight.shape[3])
        size = output_size(size, kernel, unit.stride, unit.padding, unit.dilation)
    return y.shape[0] * size[0] * size[1]


def residual_block(
    x: Tensor,
    main: Sequence[ConvBN],
    shortcut: ConvBN | Tensor | None = None,
    *,
    identity: bool = False,
    recipe: str = "separate",
    backend: str = AUTO,
) -> Tensor:
    """`relu(BN(conv(... relu(BN(conv(x))) ...)) + shortcut)` with a hand-written backward.

    Args:
        x: [N, Cin, H, W], floating; channels_last is fastest.
        main: the main path, from input to output.
        shortcut: a projection, a tensor like the output, or None.
        identity: add x itself (with shortcut None).
        recipe: "separate", or "gram" where main ends in an expanding 1x1 convolution, or "auto".
        backend: a name of `fusedres.dispatch.backend_names()`.

    Returns:
        y [N, Cout, H', W'], freshly allocated, in x's dtype (under autocast: in its dtype).

    Raises:
        ValueError: unknown recipe; "auto" or "unfused" where no recipe applies.
        BackendUnavailableError: unknown backend.
    """
    ops = dispatcher(backend)
    call = read_block(x, main, shortcut, identity)
    choice: Choice = choose(recipe, call.config, call.tensors, x, ops, wants_gradient(call))
    if choice.recipe == UNFUSED:
        raise ValueError(
            f"residual_block: recipe {recipe!r} gives {UNFUSED!r} here ({choice.reason}), which only a patched "
            "module has; ask for 'separate' or 'gram'"
        )
    return run(call, choice.recipe, ops)
