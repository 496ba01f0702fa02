"""Arguments for every raw op, as a bottleneck block of ResNet would pass them.

    python bench/op_cases.py [--device cuda] [--backend NAME] [--only REGEX] [--stage 1..4 --batch N]

runs them once, which is what compute-sanitizer and ncu are pointed at; without --stage at a few small shapes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from layers import STAGE_SIDES, STAGE_WIDTHS
from torch import Tensor

from fusedres import raw_ops
from fusedres.backends.reference import ReferenceOps
from fusedres.dispatch import AUTO, LOADERS

POOL = (3, 2, 1)  # kernel size, stride, padding
SMALL = ((2, 5, 8, 32), (1, 3, 24, 72), (3, 7, 64, 256))  # batch, side, narrow, wide


@dataclass(frozen=True)
class Shape:
    """Maps [batch, channels, side, side]: `narrow` inside a bottleneck, `wide` at its ends."""

    batch: int
    side: int
    narrow: int
    wide: int


def resnet_shape(stage: int, batch: int) -> Shape:
    width = STAGE_WIDTHS[stage - 1]
    return Shape(batch, STAGE_SIDES[stage - 1], width, 4 * width)


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
        return self.normal(channels, dtype=raw_ops.accumulation_dtype(self.dtype)).abs() + 0.5

    def vectors(self, c: Tensor) -> raw_ops.BatchNormVectors:
        mean, var = self.reference.bn_stats(c)
        return self.reference.bn_scale_shift(
            mean, var, self.vector(c.shape[1]), self.vector(c.shape[1]), 1e-5
        )

    def grads(self, dy: Tensor, c: Tensor, vectors: raw_ops.BatchNormVectors) -> raw_ops.BatchNormGrads:
        sums = self.reference.bn_add_relu_backward_reduce(dy, c, vectors)[:2]
        return self.reference.bn_backward_coefficients(*sums, vectors, dy.numel() // dy.shape[1], True)


def cases(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(name, raw op, positional arguments); a name is the op and, where there are several, its form."""
    t = Tensors(shape, dtype, device)
    c2, dy2 = t.map(shape.narrow), t.map(shape.narrow)
    v2 = t.vectors(c2)
    g2 = t.grads(dy2, c2, v2)
    yield "bn_stats", "bn_stats", (c2,)
    yield "bn_scale_shift", "bn_scale_shift", (v2.mean, v2.var, v2.scale, v2.shift, 1e-5)
    yield "bn_add_relu_forward/plain", "bn_add_relu_forward", (c2, v2.scale, v2.shift)
    yield "bn_add_relu_backward_reduce/plain", "bn_add_relu_backward_reduce", (dy2, c2, v2)
    yield "bn_backward_coefficients", "bn_backward_coefficients", (g2.dbias, g2.dweight, v2, 9, True)
    yield "bn_add_relu_backward_input/plain", "bn_add_relu_backward_input", (dy2, c2, v2, g2)

    c3, s, dy3 = t.map(shape.wide), t.map(shape.wide), t.map(shape.wide)
    v3, vs = t.vectors(c3), t.vectors(s)
    g3, gs = t.grads(dy3, c3, v3), t.grads(dy3, s, vs)
    join = (c3, v3.scale, v3.shift, s)
    _, mask = t.reference.bn_add_relu_forward(*join, save_mask=True)
    yield "bn_add_relu_forward/identity", "bn_add_relu_forward", (*join, None, None, True, True)
    yield "bn_add_relu_forward/projection", "bn_add_relu_forward", (*join, vs.scale, vs.shift, True, True)
    yield "bn_add_relu_backward_reduce/identity", "bn_add_relu_backward_reduce", (dy3, c3, v3, mask, False)
    projected = (dy3, c3, v3, mask, False, s, vs.mean)
    yield "bn_add_relu_backward_reduce/projection", "bn_add_relu_backward_reduce", projected
    back = (dy3, c3, v3, g3, mask, False)
    yield "bn_add_relu_backward_input/identity", "bn_add_relu_backward_input", (*back, None, None, True)
    yield "bn_add_relu_backward_input/projection", "bn_add_relu_backward_input", (*back, s, gs)
    yield "relu_backward", "relu_backward", (dy3, mask)

    reduce, expand = t.weight(shape.narrow, shape.wide), t.weight(shape.wide, shape.narrow)
    plain = (None, 1, None, None, None, None, None, None, None, False, False, True)
    yield "conv1x1_forward/stats", "conv1x1_forward", (c3, reduce, *plain)
    fused = (None, 1, v2.scale, v2.shift, v3.scale, v3.shift, s, None, None, True, True)
    yield "conv1x1_forward/join", "conv1x1_forward", (c2, expand, *fused)
    yield "gram", "gram", (c2, v2.scale, v2.shift)
    yield "conv1x1_backward_weight", "conv1x1_backward_weight", (dy3, mask, c2, v2.scale, v2.shift, v2.mean)
    w, acc = expand.flatten(1), v2.scale.dtype
    inner = (w.to(acc), (w.t() @ w).to(acc), v2.mean, v2.shift)
    yield "conv1x1_gram_backward_input", "conv1x1_gram_backward_input", (dy3, mask, c2, v2, *inner)
    shortcut = (dy2, c2, v2, g2, reduce, True, dy3, mask)
    yield "conv1x1_backward_input", "conv1x1_backward_input", shortcut

    stem, dp = t.map(shape.narrow, 2 * shape.side), t.map(shape.narrow)
    v0 = t.vectors(stem)
    _, indices = t.reference.bn_relu_maxpool_forward(stem, v0.scale, v0.shift, *POOL)
    yield "bn_relu_maxpool_forward", "bn_relu_maxpool_forward", (stem, v0.scale, v0.shift, *POOL)
    yield "bn_relu_maxpool_backward_reduce", "bn_relu_maxpool_backward_reduce", (dp, indices, stem, v0, *POOL)
    g0 = t.grads(stem, stem, v0)
    yield "bn_relu_maxpool_backward_input", "bn_relu_maxpool_backward_input", (dp, indices, stem, g0, *POOL)
    kernel = t.normal(shape.narrow, shape.narrow, 3, 3) / (3 * shape.narrow**0.5)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    bias = t.normal(shape.narrow)
    yield "conv_bias_add_relu_forward", "conv_bias_add_relu_forward", (c2, kernel, bias, dy2, True, *geometry)


@contextmanager
def profiled(device: str) -> Iterator[None]:
    """What a profiler that does not start by itself sees; errors of kernels surface at its end."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=(AUTO, *LOADERS), default=AUTO, help="default: each in turn")
    parser.add_argument("--only", default="", help="regular expression on case names")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3, 4))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    shapes = [resnet_shape(args.stage, args.batch)] if args.stage else [Shape(*small) for small in SMALL]
    backends = list(LOADERS) if args.backend == AUTO else [args.backend]
    for shape in shapes:
        for name, op, arguments in cases(shape, getattr(torch, args.dtype), torch.device(args.device)):
            for backend in (LOADERS[b]() for b in backends):
                if re.search(args.only, name) and backend.supports(op, *arguments) is None:
                    with profiled(args.device):
                        getattr(backend, op)(*arguments)
                    print(f"{backend.name:10} {name:40} {shape}", flush=True)


if __name__ == "__main__":
    main()
