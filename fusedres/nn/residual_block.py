"""A residual block, or a stem, over torch's own modules: reads them, runs a recipe, moves the running statistics.

The modules are read anew in every call: their parameters, modes and attributes may change between calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres.autograd import passes
from fusedres.autograd.function import applied
from fusedres.autograd.operator import block_constants, residual_block_operator
from fusedres.blocks.choice import UNFUSED, Choice, choose
from fusedres.blocks.config import BlockConfig, ConvBNConfig, ConvBNTensors, Shortcut, Window, unit_sizes
from fusedres.nn.attributes import tensor
from fusedres.nn.numbers import pair, real, square_window, whole
from fusedres.nn.running_stats import BUFFERS, BatchStatistics, update_running_stats
from fusedres.ops.contract import BatchNormVectors
from fusedres.ops.dispatch import AUTO, OpaqueBackend, Ops, operators


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
    moved: Sequence[
        Sequence[Tensor | None]
    ]  # as config.units: BUFFERS of each BN that takes the batch's statistics


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which convolutions run on x: autocast's, where it is on and casts x, else x's."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype


def read_conv_bn(unit: ConvBN) -> tuple[ConvBNConfig, ConvBNTensors]:
    """The unit's constants and tensors; the batch's statistics serve in training mode, or where there are no others.

    Raises:
        UnusualNumberError: one of its numbers is none that a recipe takes; momentum, which is read later, included.
    """
    conv, bn, relu = unit
    mean, var = tensor(bn, "running_mean"), tensor(bn, "running_var")
    training = True if bn.training else mean is None and var is None
    groups, eps, momentum = conv.groups, bn.eps, bn.momentum
    if type(momentum) is not float and momentum is not None:
        real(momentum, "momentum")
    config = ConvBNConfig(
        pair(conv.stride, "stride"),
        pair(conv.padding, "padding"),
        pair(conv.dilation, "dilation"),
        groups if type(groups) is int else whole(groups, "groups"),
        eps if type(eps) is float else real(eps, "eps"),
        training,
        relu,
    )
    weight, bias = tensor(conv, "weight"), tensor(conv, "bias")
    frozen = (None, None) if training else (mean, var)
    return config, ConvBNTensors(weight, bias, tensor(bn, "weight"), tensor(bn, "bias"), *frozen)


def read_block(
    x: Tensor,
    main: Sequence[ConvBN],
    shortcut: ConvBN | Tensor | None,
    identity: bool,
    pool: Window | None = None,
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
    config = BlockConfig(configs, kind, projection, dtype, pool)
    pairs = zip(config.units, norms, strict=True)
    moved = [[tensor(bn, name) for name in BUFFERS] if unit.training else () for unit, bn in pairs]
    return BlockCall(config, tensors, norms, x, residual, moved)


def wants_gradient(call: BlockCall) -> bool:
    if not torch.is_grad_enabled():
        return False
    for tensors in (*call.tensors, (call.x, call.residual)):  # mostly the first weight settles it
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


MISSING = "none"  # in the place of a momentum


class Observer:
    """Moves the running statistics of a call's norms by the vectors of a batch.

    tensors: all that is moved; constants: all else that counts for how.
    """

    def __init__(self, call: BlockCall) -> None:
        self.call = call
        self.tensors: list[Tensor | None] = []
        momenta: list[Any] = []
        for unit, bn, buffers in zip(call.config.units, call.norms, call.moved, strict=True):
            if unit.training and bn.training:
                self.tensors += buffers
                momenta.append(bn.momentum if bn.track_running_stats else MISSING)
        self.constants = tuple(momenta)

    def __call__(self, vectors: tuple[BatchNormVectors, ...]) -> None:
        move_running_stats(self.call, [(v.mean, v.var) for v in vectors])


def run(call: BlockCall, recipe: str, ops: Ops) -> Tensor:
    """y of the block, by that recipe; running statistics are updated."""
    config, tensors, _, x, residual, _ = call
    if isinstance(ops, OpaqueBackend):
        constants = block_constants(config, tensors, recipe, ops.name)
        y, statistics = residual_block_operator(x, residual, tensors, constants, wants_gradient(call))
        with torch.no_grad():
            move_running_stats(call, statistics)
        return y

    flat = list(chain.from_iterable(tensors))
    observer = Observer(call)
    if wants_gradient(call):
        return applied(config, recipe, ops, observer, x, residual, *flat)
    with torch.no_grad():
        return passes.forward(recipe, ops, config, observer, x, residual, flat, False)[0]


def move_running_stats(call: BlockCall, statistics: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Moves every BN's running statistics; statistics: mean, var of the batch as `config.units`."""
    if not any(unit.training for unit in call.config.units):
        return
    seen = zip(
        call.config.units, call.norms, statistics, unit_sizes(call.config, call.tensors, call.x), strict=True
    )
    n = call.x.shape[0]
    update_running_stats(
        [BatchStatistics(bn, *stats, n * h * w) for unit, bn, stats, (h, w) in seen if unit.training]
    )


def with_residual(call: BlockCall, recipe: str, ops: Ops, residual: Any) -> Tensor:
    """y of a block read without a shortcut, plus a residual computed elsewhere.

    A residual that is not like the main path's output is added by torch, with its promotion and broadcasting.
    """
    h, w = unit_sizes(call.config, call.tensors, call.x)[len(call.config.main) - 1]
    shape = call.x.shape[0], call.tensors[len(call.config.main) - 1].weight.shape[0], h, w
    if type(residual) is Tensor and residual.dtype is call.config.dtype and residual.shape == shape:
        config = call.config._replace(shortcut=Shortcut.TENSOR)
        return run(call._replace(config=config, residual=residual), recipe, ops)
    *inner, last = call.config.main
    config = call.config._replace(main=(*inner, last._replace(relu=False)))
    return torch.relu(run(call._replace(config=config), recipe, ops) + residual)


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
        recipe: "separate", "prologue", or "gram" where main ends in an expanding 1x1 convolution, or "auto".
        backend: a name of `fusedres.ops.dispatch.backend_names()`.

    Returns:
        y [N, Cout, H', W'], freshly allocated, in x's dtype (under autocast: in its dtype).

    Raises:
        ValueError: unknown recipe; "auto" or "unfused" where no recipe applies; a number of a module is a tensor,
            a string or of another type that no recipe takes (UnusualNumberError).
        BackendUnavailableError: unknown backend.
    """
    ops = operators(backend)
    call = read_block(x, main, shortcut, identity)
    choice: Choice = choose(recipe, call.config, call.tensors, x, ops, wants_gradient(call))
    if choice.recipe == UNFUSED:
        raise ValueError(
            f"residual_block: recipe {recipe!r} gives {UNFUSED!r} here ({choice.reason}), which only a patched "
            "module has; ask for 'separate' or 'gram'"
        )
    return run(call, choice.recipe, ops)


def stem_block(x: Tensor, unit: ConvBN, pool: nn.MaxPool2d, *, backend: str = AUTO) -> Tensor:
    """`maxpool(relu(BN(conv(x))))` with a hand-written backward.

    Args:
        x: [N, Cin, H, W], floating; channels_last is fastest.
        unit: the convolution and its BN, with ReLU.
        pool: a square window of at most 15, without dilation, in floor mode.
        backend: a name of `fusedres.ops.dispatch.backend_names()`.

    Returns:
        y [N, Cout, H'', W''], freshly allocated, in x's dtype (under autocast: in its dtype).

    Raises:
        ValueError: a pooling outside of that; a number of a module is a tensor, a string or of another type that no
            recipe takes (UnusualNumberError).
        BackendUnavailableError: unknown backend.
    """
    window = square_window(pool)
    if window is None:
        raise ValueError(f"stem_block: needs a square window of at most 15 without dilation, found {pool}")
    ops = operators(backend)
    return run(read_block(x.to(compute_dtype(x)), [unit], None, False, window), "separate", ops)
