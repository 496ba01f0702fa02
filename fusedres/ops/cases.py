"""Arguments for every raw op, as a bottleneck block of ResNet and its stem would pass them.

Values stay clear of the places where rounding decides: no argument of a ReLU lies near 0, and pooled values are
exact in every dtype. So masks and pooling indices are the same in every dtype and every backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.ops.contract import (
    BatchNormGrads,
    BatchNormVectors,
    BnAddReluBackwardInput,
    BnAddReluBackwardReduce,
    BnAddReluForward,
    BnBackwardCoefficients,
    BnReluMaxpoolBackwardInput,
    BnReluMaxpoolBackwardReduce,
    BnReluMaxpoolForward,
    BnScaleShift,
    BnStats,
    Conv1x1BackwardInput,
    Conv1x1BackwardWeight,
    Conv1x1Forward,
    Conv1x1GramBackwardInput,
    Conv3x3BackwardInput,
    Conv3x3Forward,
    ConvBackwardInput,
    ConvBackwardWeight,
    Gram,
    GramBackwardCoefficients,
    GramOutputStats,
    RawOp,
    ReluBackward,
    accumulation_dtype,
    op_name,
)
from fusedres.ops.reference import REFERENCE

POOL = (3, 2, 1)  # kernel size, stride, padding
NEAR_ZERO = 0.05  # far above a rounding error of bfloat16 values of order 1


@dataclass(frozen=True)
class Shape:
    """Maps [batch, channels, side, side]: `narrow` inside a bottleneck, `wide` at its ends."""

    batch: int
    side: int
    narrow: int
    wide: int


# the last one takes several steps of every product and several tiles of every reduction, and has the channels of an
# ordinary block
SMALL = (Shape(2, 5, 8, 32), Shape(1, 3, 24, 72), Shape(3, 7, 64, 256), Shape(2, 12, 256, 512))


class OpCase(NamedTuple):
    """One call of an op, and the name of its form where there are several."""

    op: RawOp
    form: str = ""

    @property
    def name(self) -> str:
        """ "bn_stats", or "bn_add_relu_forward/identity" of a form."""
        return op_name(type(self.op)) + (f"/{self.form}" if self.form else "")


class Layer(NamedTuple):
    """A raw convolution output, its gradient, and its BN."""

    c: Tensor
    dy: Tensor
    vectors: BatchNormVectors
    grads: BatchNormGrads


class Tensors:
    """Random tensors of one dtype and device, the same for a seed; statistics belong to the tensors."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(size, device=self.device, generator=self.generator, dtype=torch.float32)
        values = values.to(dtype or self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(size) == 4 else values

    def map(self, channels: int, side: int | None = None) -> Tensor:
        side = side or self.shape.side
        return self.normal(self.shape.batch, channels, side, side)

    def weight(self, cout: int, cin: int, kernel: int = 1) -> Tensor:
        return self.normal(cout, cin, kernel, kernel) * (cin**-0.5 / kernel)

    def vector(self, channels: int) -> Tensor:
        return self.normal(channels, dtype=accumulation_dtype(self.dtype)).abs() + 0.5

    def vectors(self, c: Tensor) -> BatchNormVectors:
        weight, bias = self.vector(c.shape[1]), self.vector(c.shape[1])
        mean, var = REFERENCE(BnStats(c))
        return REFERENCE(BnScaleShift(mean, var, weight, bias, 1e-5))

    def grads(self, dy: Tensor, c: Tensor, vectors: BatchNormVectors) -> BatchNormGrads:
        sum_dz, centered, _ = REFERENCE(BnAddReluBackwardReduce(dy, c, vectors))
        rows = dy.numel() // dy.shape[1]
        return REFERENCE(BnBackwardCoefficients(sum_dz, centered, vectors, rows, True))

    def layer(self, channels: int) -> Layer:
        c, dy = self.map(channels) + 0.5, self.map(channels)  # a mean of 0 has no relative error
        vectors = self.vectors(c)
        c = clear_of_zero(c, vectors.scale, vectors.shift)
        return Layer(c, dy, vectors, self.grads(dy, c, vectors))

    def stem(self, channels: int) -> tuple[Tensor, BatchNormVectors]:
        """A map [batch, channels, 2*side, 2*side] and vectors whose scale*c + shift is exact in every dtype."""
        side = 2 * self.shape.side
        size = (self.shape.batch, channels, side, side)
        steps = torch.randint(-16, 17, size, device=self.device, generator=self.generator)
        c = (steps / 8).to(self.dtype).contiguous(memory_format=torch.channels_last)
        vectors = self.vectors(c)
        powers = 2.0 ** (torch.arange(channels, device=self.device) % 3 - 1)
        exact = {"scale": powers.to(vectors.scale), "shift": torch.full_like(vectors.shift, 1 / 16)}
        return c, vectors._replace(**exact)


def clear_of_zero(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    """x [N, C, H, W] with values moved where `scale*x + shift + added` would lie near 0; scale > 0."""
    factor = 1.0 if scale is None else scale[:, None, None]
    z = x * factor
    for term in (None if shift is None else shift[:, None, None], added):
        z = z if term is None else z + term
    return torch.where(z.abs() < NEAR_ZERO, x + 0.5 / factor, x).to(x.dtype)


def cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[OpCase]:
    """Every raw op, in at least one form."""
    t = Tensors(shape, dtype, device)
    inner, outer = t.layer(shape.narrow), t.layer(shape.wide)
    yield from inner_cases(inner)
    yield from join_cases(t, outer)
    yield from product_cases(t, inner, outer)
    yield from convolution_cases(t, inner, outer)
    yield from conv3x3_cases(t, inner)
    yield from stem_cases(t, inner)


def inner_cases(layer: Layer) -> Iterator[OpCase]:
    """BN and ReLU inside a block."""
    c, dy, v, g = layer
    yield OpCase(BnStats(c))
    yield OpCase(BnScaleShift(v.mean, v.var, v.scale, v.shift, 1e-5))
    yield OpCase(BnAddReluForward(c, v.scale, v.shift), "plain")
    yield OpCase(BnAddReluBackwardReduce(dy, c, v), "plain")
    yield OpCase(BnBackwardCoefficients(g.dbias, g.dweight, v, 9, True))
    yield OpCase(BnAddReluBackwardInput(dy, c, v, g), "plain")


def join_cases(t: Tensors, layer: Layer) -> Iterator[OpCase]:
    """The end of a block: BN, identity or projection, ReLU, with a mask."""
    c, dy, v, g = layer
    z, _ = REFERENCE(BnAddReluForward(c, v.scale, v.shift, relu=False))
    s = t.map(c.shape[1])
    vs = t.vectors(s)
    identity = BnAddReluForward(c, v.scale, v.shift, clear_of_zero(s, added=z), save_mask=True)
    projected = clear_of_zero(s, vs.scale, vs.shift, z)
    projection = identity._replace(residual=projected, residual_scale=vs.scale, residual_shift=vs.shift)
    yield OpCase(identity, "identity")
    yield OpCase(projection, "projection")
    _, mask = REFERENCE(identity)
    reduce = BnAddReluBackwardReduce(dy, c, v, mask, relu=False)
    yield OpCase(reduce, "identity")
    yield OpCase(reduce._replace(shortcut_c=s, shortcut_mean=vs.mean), "projection")
    back = BnAddReluBackwardInput(dy, c, v, g, mask, relu=False)
    yield OpCase(back._replace(save_dz=True), "identity")
    yield OpCase(back._replace(shortcut_c=s, shortcut_grads=t.grads(dy, s, vs)), "projection")
    yield OpCase(ReluBackward(dy, mask))


def product_cases(t: Tensors, inner: Layer, outer: Layer) -> Iterator[OpCase]:
    """The fused 1x1 convolutions of training."""
    c, dy, v, g = inner
    wide, dy_wide, v_wide, _ = outer
    narrow_channels, wide_channels = c.shape[1], wide.shape[1]
    reduce, expand = t.weight(narrow_channels, wide_channels), t.weight(wide_channels, narrow_channels)
    yield OpCase(Conv1x1Forward(wide, reduce, save_stats=True), "stats")
    affine = Conv1x1Forward(
        c, expand, in_scale=v.scale, in_shift=v.shift, scale=v_wide.scale, shift=v_wide.shift
    )
    residual = clear_of_zero(t.map(wide_channels), added=REFERENCE(affine).y)
    join = affine._replace(residual=residual, relu=True, save_mask=True)
    yield OpCase(join, "join")
    yield OpCase(Gram(c, v.scale, v.shift))
    m, S = REFERENCE(Gram(c, v.scale, v.shift))
    output_stats = GramOutputStats(expand, t.normal(wide_channels), m, S)
    yield OpCase(output_stats)
    center = REFERENCE(output_stats)[2]
    weight = Conv1x1BackwardWeight(dy_wide, REFERENCE(join).mask, c, v.scale, v.shift, center)
    yield OpCase(weight)
    rows = c.numel() // narrow_channels
    r, sum_dz = REFERENCE(weight)
    frozen = GramBackwardCoefficients(r, sum_dz, expand, output_stats.bias, v_wide, rows)
    yield OpCase(frozen._replace(m=m, S=S, center=center), "training")
    yield OpCase(frozen, "frozen")
    w, acc = expand.flatten(1), v.scale.dtype
    above = w.to(acc), (w.t() @ w).to(acc), v.mean, v.shift
    yield OpCase(Conv1x1GramBackwardInput(dy_wide, weight.mask, c, v, *above))
    yield OpCase(Conv1x1BackwardInput(dy, c, v, g, reduce, True, dy_wide, weight.mask))


def convolution_cases(t: Tensors, inner: Layer, outer: Layer) -> Iterator[OpCase]:
    """Convolutions of inference, and the gradients of those that a library may serve."""
    c, dy, v, _ = inner
    wide, dy_wide, v_wide, _ = outer
    narrow, side = c.shape[1:3]
    reduce, expand = t.weight(narrow, wide.shape[1]), t.weight(wide.shape[1], narrow)
    _, mask = REFERENCE(BnAddReluForward(wide, v_wide.scale, v_wide.shift, save_mask=True))
    same, pointwise = ((1, 1), (1, 1), (1, 1), 1), ((1, 1), (0, 0), (1, 1), 1)
    yield OpCase(ConvBackwardWeight(dy, c, (3, 3), *same), "3x3")
    yield OpCase(ConvBackwardWeight(dy, c, (3, 3), *same, v.scale, v.shift), "3x3 prologue")
    yield OpCase(ConvBackwardWeight(dy_wide, c, (1, 1), *pointwise), "1x1")
    yield OpCase(ConvBackwardInput(dy, c, t.weight(narrow, narrow, 3), *same, t.map(narrow)), "3x3")
    yield OpCase(ConvBackwardInput(dy, wide, reduce, *pointwise, dy_wide, mask), "masked")
    half = t.map(narrow, (side + 1) // 2)
    yield OpCase(ConvBackwardInput(half, wide, reduce, (2, 2), *pointwise[1:], dy_wide), "strided")
    affine = Conv1x1Forward(c, expand, scale=v_wide.scale, shift=v_wide.shift, relu=True)
    yield OpCase(affine._replace(residual=t.map(wide.shape[1])), "inference")


def conv3x3_cases(t: Tensors, layer: Layer) -> Iterator[OpCase]:
    """The fused 3x3 convolutions, of both strides and with groups."""
    c, dy, v, g = layer
    channels, half = c.shape[1], (t.shape.side + 1) // 2
    weight = t.weight(channels, channels, 3)
    yield OpCase(Conv3x3Forward(c, weight, in_scale=v.scale, in_shift=v.shift, save_stats=True), "stats")
    affine = Conv3x3Forward(c, weight, 2, scale=v.scale, shift=v.shift)
    residual = clear_of_zero(t.map(channels, half), added=REFERENCE(affine).y)
    yield OpCase(affine._replace(residual=residual, relu=True, save_mask=True), "strided")
    _, mask = REFERENCE(BnAddReluForward(c, v.scale, v.shift, save_mask=True))
    joined = t.map(channels), mask
    yield OpCase(Conv3x3BackwardInput(dy, c, weight, 1, c, v, g, True, *joined), "joined")
    yield OpCase(Conv3x3BackwardInput(t.map(channels, half), c, weight, 2), "strided")
    if channels % 4 != 0:
        return
    groups, weight = channels // 4, t.weight(channels, 4, 3)
    same = (1, 1), (1, 1), (1, 1), groups
    yield OpCase(
        Conv3x3Forward(c, weight, 1, scale=v.scale, shift=v.shift, relu=True, groups=groups), "groups"
    )
    yield OpCase(ConvBackwardWeight(dy, c, (3, 3), *same), "groups")
    yield OpCase(ConvBackwardInput(dy, c, weight, *same), "groups")


def stem_cases(t: Tensors, pooled: Layer) -> Iterator[OpCase]:
    """BN, ReLU and max-pooling; the gradient has the pooled size."""
    c, v = t.stem(pooled.c.shape[1])
    dy, g = pooled.dy, t.grads(c, c, v)
    forward = BnReluMaxpoolForward(c, v.scale, v.shift, *POOL)
    _, indices = REFERENCE(forward)
    yield OpCase(forward)
    yield OpCase(BnReluMaxpoolBackwardReduce(dy, indices, c, v, *POOL))
    yield OpCase(BnReluMaxpoolBackwardInput(dy, indices, c, g, *POOL))
