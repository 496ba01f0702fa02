"""Every raw op without its values: fresh tensors of the right shapes, dtypes and memory formats.

What torch runs in place of an operator while it traces. The contract in `fusedres.raw_ops`, and nothing of any one
backend; the operators' tests hold it against them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.raw_ops import BatchNormGrads, BatchNormVectors, Conv1x1Output, GramGrads, accumulation_dtype


def vector(like: Tensor, channels: int, count: int = 1) -> tuple[Tensor, ...]:
    """`count` vectors [channels] in the accumulation dtype of `like`."""
    acc = accumulation_dtype(like.dtype)
    return tuple(like.new_empty((channels,), dtype=acc) for _ in range(count))


def packed_mask(y: Tensor) -> Tensor:
    return y.new_empty(((y.numel() + 7) // 8,), dtype=torch.uint8)


def activation(like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Of this shape, in the memory format of `like`."""
    channels_last = torch.empty_like(like).is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


class FakeOps:
    """`RawOps` that computes nothing."""

    name = "fake"

    def supports(self, op: str, *args: object, **kwargs: object) -> str | None:
        return None

    def bn_stats(self, c):
        return vector(c, c.shape[1], 2)

    def bn_scale_shift(self, mean, var, weight, bias, eps):
        return BatchNormVectors(mean, var, *(torch.empty_like(mean) for _ in range(3)))

    def bn_add_relu_forward(
        self,
        c,
        scale,
        shift,
        residual=None,
        residual_scale=None,
        residual_shift=None,
        relu=True,
        save_mask=False,
        reuse_c=False,
    ):
        y = torch.empty_like(c)
        return y, packed_mask(y) if save_mask else None

    def bn_add_relu_backward_reduce(
        self, dy, c, vectors, mask=None, relu=True, shortcut_c=None, shortcut_mean=None
    ):
        sum_dz, sum_dz_centered, sum_dz_shortcut = vector(c, c.shape[1], 3)
        return sum_dz, sum_dz_centered, None if shortcut_c is None else sum_dz_shortcut

    def bn_backward_coefficients(self, sum_dz, sum_dz_centered, vectors, rows, training):
        dweight, B, K = (torch.empty_like(sum_dz) for _ in range(3))
        return BatchNormGrads(dweight, sum_dz, vectors.scale, *((B, K) if training else (None, None)))

    def bn_add_relu_backward_input(
        self,
        dy,
        c,
        vectors,
        grads,
        mask=None,
        relu=True,
        shortcut_c=None,
        shortcut_grads=None,
        save_dz=False,
        reuse_dy=False,
        reuse_c=False,
    ):
        if shortcut_c is not None:
            return torch.empty_like(c), torch.empty_like(shortcut_c)
        return torch.empty_like(c), torch.empty_like(c) if save_dz else None

    def relu_backward(self, dy, mask):
        return torch.empty_like(dy)

    def bn_relu_maxpool_forward(self, c, scale, shift, kernel_size, stride, padding, save_indices=True):
        h, w = ((n + 2 * padding - kernel_size) // stride + 1 for n in c.shape[2:])
        y = activation(c, (c.shape[0], c.shape[1], h, w))
        return y, torch.empty_like(y, dtype=torch.uint8) if save_indices else None

    def bn_relu_maxpool_backward_reduce(self, dy, indices, c, vectors, kernel_size, stride, padding):
        return vector(c, c.shape[1], 2)

    def bn_relu_maxpool_backward_input(self, dy, indices, c, grads, kernel_size, stride, padding):
        return torch.empty_like(c)

    def conv1x1_forward(
        self,
        x,
        weight,
        bias=None,
        stride=1,
        in_scale=None,
        in_shift=None,
        scale=None,
        shift=None,
        residual=None,
        residual_scale=None,
        residual_shift=None,
        relu=False,
        save_mask=False,
        save_stats=False,
    ):
        h, w = ((n - 1) // stride + 1 for n in x.shape[2:])
        y = activation(x, (x.shape[0], weight.shape[0], h, w))
        stats = vector(x, weight.shape[0], 2) if save_stats else (None, None)
        return Conv1x1Output(y, packed_mask(y) if save_mask else None, *stats)

    def gram(self, c, scale, shift):
        cin = c.shape[1]
        return *vector(c, cin), scale.new_empty((cin, cin), dtype=accumulation_dtype(c.dtype))

    def gram_output_stats(self, weight, bias, m, S):
        mean, var = (m.new_empty((weight.shape[0],)) for _ in range(2))
        return mean, var, torch.empty_like(m)

    def gram_backward_coefficients(self, r, sum_dz, weight, bias, vectors, rows, m=None, S=None, center=None):
        below = (None, None) if m is None else (torch.empty_like(S), torch.empty_like(m))
        return GramGrads(torch.empty_like(sum_dz), torch.empty_like(r), torch.empty_like(r), *below)

    def conv1x1_backward_weight(self, dy, mask, c, scale, shift, center=None):
        cout, cin = dy.shape[1], c.shape[1]
        return scale.new_empty((cout, cin), dtype=accumulation_dtype(c.dtype)), *vector(dy, cout)

    def conv1x1_gram_backward_input(
        self, dy, mask, c, vectors, weight_dz, weight_a=None, center=None, offset=None
    ):
        return torch.empty_like(c), *vector(c, c.shape[1], 2)

    def conv1x1_backward_input(
        self, dy, c, vectors, grads, weight, relu=True, shortcut_dy=None, shortcut_mask=None
    ):
        return activation(c, (c.shape[0], weight.shape[1], *c.shape[2:])), torch.empty_like(c)

    def conv_backward_weight(self, dy, x, kernel_size, stride, padding, dilation, groups):
        dw = activation(x, (dy.shape[1], x.shape[1] // groups, *kernel_size))
        return dw.to(accumulation_dtype(x.dtype))

    def conv_backward_input(
        self,
        dy,
        x,
        weight,
        stride,
        padding,
        dilation,
        groups,
        shortcut_dy=None,
        shortcut_mask=None,
        reuse_shortcut=False,
    ):
        return activation(x, x.shape)
