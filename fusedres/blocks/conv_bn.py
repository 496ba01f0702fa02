"""One convolution and its BN, forward: a piece that the recipes are made of.

Convolutions that no raw op covers go to torch's own, on plain tensors. Called by `separate` and `gram`. Backward is in
`conv_bn_backward.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.blocks.config import ConvBNConfig, ConvBNTensors
from fusedres.blocks.gram_form import is_plain_1x1, is_strided_1x1
from fusedres.blocks.prologue_form import is_grouped_3x3, is_plain_3x3
from fusedres.blocks.statistics import vectors_of_batch
from fusedres.ops.backend import Backend
from fusedres.ops.contract import (
    BatchNormVectors,
    BnAddReluForward,
    BnStats,
    Conv1x1Forward,
    Conv3x3Forward,
)
from fusedres.ops.dispatch import Dispatcher


def convolve(x: Tensor, unit: ConvBNConfig, t: ConvBNTensors) -> Tensor:
    """The raw convolution output c [N, Cout, H', W'], in x's dtype."""
    bias = None if t.conv_bias is None else t.conv_bias.to(x.dtype)
    return F.conv2d(x, t.weight.to(x.dtype), bias, unit.stride, unit.padding, unit.dilation, unit.groups)


def fused_convolution(
    x: Tensor, unit: ConvBNConfig, t: ConvBNTensors, strided: bool = False
) -> Conv1x1Forward | Conv3x3Forward | None:
    """The raw op of this convolution, to which more can be fused; None: there is none of its form.

    strided: whether a 1x1 convolution may have a stride.
    """
    bias = None if t.conv_bias is None else t.conv_bias.to(x.dtype)
    if is_plain_1x1(unit, t) or (strided and is_strided_1x1(unit, t)):
        return Conv1x1Forward(x, cast_later(t, x), bias, unit.stride[0])
    if bias is None and (is_plain_3x3(unit, t) or (x.is_cpu and is_grouped_3x3(unit, t))):
        return Conv3x3Forward(x, cast_later(t, x), unit.stride[0], groups=unit.groups)
    return None


class Unstored(NamedTuple):
    """An activation relu(scale*c + shift) that is made as it is read."""

    c: Tensor  # [N, C, H, W]
    vectors: BatchNormVectors
    backend: Backend | None = None  # which makes it as it convolves it

    def stored(self, ops: Dispatcher) -> Tensor:
        y, _ = ops(BnAddReluForward(self.c, self.vectors.scale, self.vectors.shift))
        return y


def unstored(
    ops: Dispatcher, c: Tensor, v: BatchNormVectors, unit: ConvBNConfig, t: ConvBNTensors, stats: bool
) -> Unstored | None:
    """relu(BN(c)), if a backend makes it as it convolves it; unit, t: that convolution. stats: whether BN's statistics
    are asked of it too.
    """
    op = fused_convolution(c, unit, t)
    if op is None:
        return None
    backend = ops.serving(op._replace(in_scale=v.scale, in_shift=v.shift, save_stats=stats))
    return None if backend.is_plain else Unstored(c, v, backend)


def conv_bn_forward(
    ops: Dispatcher,
    x: Tensor | Unstored,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    frozen: BatchNormVectors | None,
) -> tuple[Tensor, BatchNormVectors]:
    """c and the vectors of its BN: `frozen`, or those of the batch. x: an unstored one is `unstored`'s."""
    c, mean, var = convolve_fused(ops, x, unit, t, frozen is None)
    if frozen is not None:
        return c, frozen
    if mean is None or var is None:
        mean, var = ops(BnStats(c))
    return c, vectors_of_batch(ops, unit, t, mean, var)


def convolve_fused(
    ops: Dispatcher, x: Tensor | Unstored, unit: ConvBNConfig, t: ConvBNTensors, stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """c by a backend that has this convolution, else by torch's own; its mean and var where those come with it."""
    if isinstance(x, Unstored):
        op = fused_convolution(x.c, unit, t)
        assert op is not None and x.backend is not None
        prologue = op._replace(in_scale=x.vectors.scale, in_shift=x.vectors.shift, save_stats=stats)
        out = x.backend(with_weight(prologue, t))
        return out.y, out.mean, out.var
    op = fused_convolution(x, unit, t)
    if op is not None and (stats or isinstance(op, Conv3x3Forward)):
        backend = ops.serving(op._replace(save_stats=stats))
        if not backend.is_plain:
            out = backend(with_weight(op._replace(save_stats=stats), t))
            return out.y, out.mean, out.var
    return convolve(x, unit, t), None, None


def conv_bn_add_relu(
    ops: Dispatcher,
    x: Tensor | Unstored,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    vectors: BatchNormVectors,
    relu: bool,
    shortcut: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Tensor | None:
    """relu(BN(conv(x)) + shortcut) at once, where a backend has that for the convolution, on a CPU; else None.

    shortcut: a tensor, and scale and shift of its BN or None.
    """
    given = x.c if isinstance(x, Unstored) else x
    op = fused_convolution(given, unit, t, strided=True) if given.is_cpu else None
    if op is None:
        return None
    if isinstance(x, Unstored):
        op = op._replace(in_scale=x.vectors.scale, in_shift=x.vectors.shift)
    residual, residual_scale, residual_shift = shortcut
    op = op._replace(
        scale=vectors.scale,
        shift=vectors.shift,
        residual=residual,
        residual_scale=residual_scale,
        residual_shift=residual_shift,
        relu=relu,
    )
    backend = ops.serving(op)
    if backend.is_plain:
        return None
    return backend(with_weight(op, t)).y


def cast_later(t: ConvBNTensors, x: Tensor) -> Tensor:
    """A tensor of the form that the convolution's weight has once cast to x's dtype, to ask which backend takes it."""
    return t.weight if t.weight.dtype == x.dtype else torch.empty_like(t.weight, dtype=x.dtype)


def with_weight(op: Conv1x1Forward | Conv3x3Forward, t: ConvBNTensors) -> Conv1x1Forward | Conv3x3Forward:
    """The same call with the weight itself in the place of what stood for it."""
    return op if op.weight is t.weight else op._replace(weight=t.weight.to(op.x.dtype))
