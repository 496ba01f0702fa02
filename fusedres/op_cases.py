"""Arguments for every raw op, as a bottleneck block of ResNet and its stem would pass them.

Values stay clear of the places where rounding decides: no argument of a ReLU lies near 0, and pooled values are
exact in every dtype. So masks and pooling indices are the same in every dtype and every backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.backends.reference import ReferenceOps
from fusedres.raw_ops import BatchNormGrads, BatchNormVectors, accumulation_dtype

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
    """One call: `name` is the op and, where there are several, its form; `arguments` are positional."""

    name: str
    op: str
    arguments: tuple[Any, ...]


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
        self.reference = ReferenceOps()

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(size, device=self.device, generator=self.generator, dtype=torch.float32)
        values = values.to(dtype or self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(size) == 4 else values

    def map(self, channels: int, side: int | None = None) -> Tensor:
        side = side or self.shape.side
        return self.normal(self.shape.batch, channels, side, side)

    def weight(self, cout: int, cin: int) -> Tensor:
        return self.normal(cout, cin, 1, 1) * cin**-0.5

    def vector(self, channels: int) -> Tensor:
        return self.normal(channels, dtype=accumulation_dtype(self.dtype)).abs() + 0.5

    def vectors(self, c: Tensor) -> BatchNormVectors:
        weight, bias = self.vector(c.shape[1]), self.vector(c.shape[1])
        mean, var = self.reference.bn_stats(c)
        return self.reference.bn_scale_shift(mean, var, weight, bias, 1e-5)

    def grads(self, dy: Tensor, c: Tensor, vectors: BatchNormVectors) -> BatchNormGrads:
        sum_dz, centered, _ = self.reference.bn_add_relu_backward_reduce(dy, c, vectors)
        rows = dy.numel() // dy.shape[1]
        return self.reference.bn_backward_coefficients(sum_dz, centered, vectors, rows, True)

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
    yield from stem_cases(t, inner)


def inner_cases(layer: Layer) -> Iterator[OpCase]:
    """BN and ReLU inside a block."""
    c, dy, v, g = layer
    yield OpCase("bn_stats", "bn_stats", (c,))
    yield OpCase("bn_scale_shift", "bn_scale_shift", (v.mean, v.var, v.scale, v.shift, 1e-5))
    yield OpCase("bn_add_relu_forward/plain", "bn_add_relu_forward", (c, v.scale, v.shift))
    yield OpCase("bn_add_relu_backward_reduce/plain", "bn_add_relu_backward_reduce", (dy, c, v))
    yield OpCase("bn_backward_coefficients", "bn_backward_coefficients", (g.dbias, g.dweight, v, 9, True))
    yield OpCase("bn_add_relu_backward_input/plain", "bn_add_relu_backward_input", (dy, c, v, g))


def join_cases(t: Tensors, layer: Layer) -> Iterator[OpCase]:
    """The end of a block: BN, identity or projection, ReLU, with a mask."""
    c, dy, v, g = layer
    z, _ = t.reference.bn_add_relu_forward(c, v.scale, v.shift, relu=False)
    s = t.map(c.shape[1])
    vs = t.vectors(s)
    identity = (c, v.scale, v.shift, clear_of_zero(s, added=z))
    _, mask = t.reference.bn_add_relu_forward(*identity, save_mask=True)
    projection = (c, v.scale, v.shift, clear_of_zero(s, vs.scale, vs.shift, z), vs.scale, vs.shift)
    yield OpCase("bn_add_relu_forward/identity", "bn_add_relu_forward", (*identity, None, None, True, True))
    yield OpCase("bn_add_relu_forward/projection", "bn_add_relu_forward", (*projection, True, True))
    reduce, masked = "bn_add_relu_backward_reduce", (dy, c, v, mask, False)
    yield OpCase(f"{reduce}/identity", reduce, masked)
    yield OpCase(f"{reduce}/projection", reduce, (*masked, s, vs.mean))
    back, given = "bn_add_relu_backward_input", (dy, c, v, g, mask, False)
    yield OpCase(f"{back}/identity", back, (*given, None, None, True))
    yield OpCase(f"{back}/projection", back, (*given, s, t.grads(dy, s, vs)))
    yield OpCase("relu_backward", "relu_backward", (dy, mask))


def product_cases(t: Tensors, inner: Layer, outer: Layer) -> Iterator[OpCase]:
    """The fused 1x1 convolutions of training."""
    c, dy, v, g = inner
    wide, dy_wide, v_wide, _ = outer
    narrow_channels, wide_channels = c.shape[1], wide.shape[1]
    reduce, expand = t.weight(narrow_channels, wide_channels), t.weight(wide_channels, narrow_channels)
    plain = (None, 1, None, None, None, None, None, None, None, False, False, True)
    yield OpCase("conv1x1_forward/stats", "conv1x1_forward", (wide, reduce, *plain))
    prologue, epilogue = (None, 1, v.scale, v.shift), (v_wide.scale, v_wide.shift)
    z = t.reference.conv1x1_forward(c, expand, *prologue, *epilogue).y
    residual = clear_of_zero(t.map(wide_channels), added=z)
    join = (*prologue, *epilogue, residual, None, None, True, True)
    yield OpCase("conv1x1_forward/join", "conv1x1_forward", (c, expand, *join))
    mask = t.reference.conv1x1_forward(c, expand, *join).mask
    yield OpCase("gram", "gram", (c, v.scale, v.shift))
    m, S = t.reference.gram(c, v.scale, v.shift)
    bias = t.normal(wide_channels)
    yield OpCase("gram_output_stats", "gram_output_stats", (expand, bias, m, S))
    center = t.reference.gram_output_stats(expand, bias, m, S)[2]
    weight = (dy_wide, mask, c, v.scale, v.shift, center)
    yield OpCase("conv1x1_backward_weight", "conv1x1_backward_weight", weight)
    r, rows = t.reference.conv1x1_backward_weight(*weight), c.numel() // narrow_channels
    algebra, above = "gram_backward_coefficients", (*r, expand, bias, v_wide, rows)
    yield OpCase(f"{algebra}/training", algebra, (*above, m, S, center))
    yield OpCase(f"{algebra}/frozen", algebra, above)
    w, acc = expand.flatten(1), v.scale.dtype
    below = (dy_wide, mask, c, v, w.to(acc), (w.t() @ w).to(acc), v.mean, v.shift)
    yield OpCase("conv1x1_gram_backward_input", "conv1x1_gram_backward_input", below)
    shortcut = (dy, c, v, g, reduce, True, dy_wide, mask)
    yield OpCase("conv1x1_backward_input", "conv1x1_backward_input", shortcut)


def convolution_cases(t: Tensors, inner: Layer, outer: Layer) -> Iterator[OpCase]:
    """Convolutions of inference, and the gradients of those that a library may serve."""
    c, dy, _, _ = inner
    wide, dy_wide, v_wide, _ = outer
    narrow, side = c.shape[1:3]
    reduce, expand = t.weight(narrow, wide.shape[1]), t.weight(wide.shape[1], narrow)
    _, mask = t.reference.bn_add_relu_forward(wide, v_wide.scale, v_wide.shift, save_mask=True)
    same, pointwise = ((1, 1), (1, 1), (1, 1), 1), ((1, 1), (0, 0), (1, 1), 1)
    weight, back = "conv_backward_weight", "conv_backward_input"
    yield OpCase(f"{weight}/3x3", weight, (dy, c, (3, 3), *same))
    yield OpCase(f"{weight}/1x1", weight, (dy_wide, c, (1, 1), *pointwise))
    yield OpCase(f"{back}/masked", back, (dy, wide, reduce, *pointwise, dy_wide, mask))
    strided = (t.map(narrow, (side + 1) // 2), wide, reduce, (2, 2), *pointwise[1:], dy_wide)
    yield OpCase(f"{back}/strided", back, strided)
    affine = (None, 1, None, None, v_wide.scale, v_wide.shift, t.map(wide.shape[1]), None, None, True)
    yield OpCase("conv1x1_forward/inference", "conv1x1_forward", (c, expand, *affine))


def stem_cases(t: Tensors, pooled: Layer) -> Iterator[OpCase]:
    """BN, ReLU and max-pooling; the gradient has the pooled size."""
    c, v = t.stem(pooled.c.shape[1])
    dy, g = pooled.dy, t.grads(c, c, v)
    _, indices = t.reference.bn_relu_maxpool_forward(c, v.scale, v.shift, *POOL)
    yield OpCase("bn_relu_maxpool_forward", "bn_relu_maxpool_forward", (c, v.scale, v.shift, *POOL))
    reduce, back = "bn_relu_maxpool_backward_reduce", "bn_relu_maxpool_backward_input"
    yield OpCase(reduce, reduce, (dy, indices, c, v, *POOL))
    yield OpCase(back, back, (dy, indices, c, g, *POOL))
