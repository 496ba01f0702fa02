"""Every raw op that Triton kernels serve: CUDA tensors, and CPU tensors under TRITON_INTERPRET=1.

Triton itself is imported at the first op that is served. Maths and shapes are in `fusedres.raw_ops`; kernels
and launchers, which know nothing of the rest of fusedres, in `fusedres.triton_kernels`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fusedres.raw_ops import BatchNormGrads, BatchNormVectors, Conv1x1Output, GramGrads

# each op, and the place of the argument that decides: its memory format is the output's
SERVED = {
    "bn_stats": 0,
    "bn_scale_shift": 0,
    "bn_add_relu_forward": 0,
    "bn_add_relu_backward_reduce": 1,
    "bn_backward_coefficients": 0,
    "bn_add_relu_backward_input": 1,
    "relu_backward": 0,
    "bn_relu_maxpool_forward": 0,
    "bn_relu_maxpool_backward_reduce": 2,
    "bn_relu_maxpool_backward_input": 2,
    "conv1x1_forward": 0,
    "gram": 0,
    "gram_output_stats": 0,
    "gram_backward_coefficients": 2,
    "conv1x1_backward_weight": 2,
    "conv1x1_gram_backward_input": 2,
    "conv1x1_backward_input": 1,
}
# of activations; those of the other Gram ops are of weights alone, in float64 throughout
PRODUCTS = {op for op in SERVED if op.startswith("conv1x1")} | {"gram"}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_ROWS = 2**31 - 2**16  # row numbers are 32-bit, offsets 64-bit; the difference is room for the last tile
OLDEST_CAPABILITY = (8, 0)  # bfloat16 products and asynchronous copies


@cache
def launchers() -> ModuleType:
    from fusedres.triton_kernels import launchers

    return launchers


def tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    """The arguments that are tensors, and those in named tuples of vectors."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from (t for t in arg if isinstance(t, Tensor))


def widest(op: str, wide: list[Tensor]) -> int:
    """The most channels that a product reads or writes, of its activations and weights."""
    cout = wide[1].shape[0] if op == "conv1x1_forward" else 0
    return max(cout, *(t.shape[1] for t in wide))


@lru_cache(maxsize=4096)
def offsets_fit(op: str, cin: int, widest: int) -> bool:
    """Whether offsets inside one program's share of the rows, and inside the weight, stay below 2^31."""
    from fusedres.triton_kernels import tiles

    rows = tiles.STATISTICS_ROWS
    if op == "gram":
        rows = tiles.gram_rows(cin, tiles.output_tile(tiles.GRAM, cin, cin).bn)
    elif op == "conv1x1_backward_weight":
        rows = tiles.weight_rows(cin)
    return max(rows, 2 * widest) * widest < 2**31


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def activation_vectors(
    vectors: BatchNormVectors, mask: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor] | None:
    """scale and shift where dz comes from the sign of `scale*c + shift`."""
    return (vectors.scale, vectors.shift) if mask is None and relu else None


def coefficients(grads: BatchNormGrads) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return grads.A, grads.B, grads.K


class TritonOps:
    """`RawOps` by Triton kernels."""

    name = "triton"

    def __init__(self) -> None:
        self.interpreted = os.environ.get("TRITON_INTERPRET") == "1"

    def supports(self, op: str, *args: Any, **kwargs: Any) -> str | None:
        place = SERVED.get(op)
        if place is None:
            return "no_triton_kernel"
        tensor = args[place]
        reason = self._device_reason(tensor)
        if reason is not None:
            return reason
        given = list(tensors((*args, *kwargs.values())))
        # the kernels step through vectors and masks by 1: one of a strided or expanded parameter reads elsewhere
        if not all(t.is_contiguous() for t in given if t.dim() < 4):
            return "vector_not_dense"
        return self._activations_reason(op, tensor, given) if tensor.dim() == 4 else None

    def _activations_reason(self, op: str, tensor: Tensor, given: list[Tensor]) -> str | None:
        """tensor: the one that decides, among those given."""
        wide = [t for t in given if t.dim() == 4]  # activations and convolution weights
        if len({t.dtype for t in wide} - {torch.uint8}) > 1:
            return "mixed_dtypes"
        if tensor.numel() == 0:
            return "empty"
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            return "not_channels_last"
        if tensor.numel() // tensor.shape[1] > MAX_ROWS:
            return "too_many_rows"
        if op in PRODUCTS and not offsets_fit(op, tensor.shape[1], widest(op, wide)):
            return "too_many_channels"
        # TF32 would round a and W differently in the statistics than in the product
        return (
            "float32_product" if op in PRODUCTS and tensor.is_cuda and tensor.dtype == torch.float32 else None
        )

    def _device_reason(self, tensor: Tensor) -> str | None:
        if tensor.dtype not in DTYPES:
            return f"dtype_{str(tensor.dtype).removeprefix('torch.')}"
        if tensor.is_cuda:
            if torch.version.hip is not None:
                return "rocm"  # tiles, and the instruction that waits for a product, are NVIDIA's
            old = torch.cuda.get_device_capability(tensor.device) < OLDEST_CAPABILITY
            return "compute_capability_below_8" if old else None
        if not self.interpreted or tensor.device.type != "cpu":
            return f"device_{tensor.device.type}"
        # the interpreter multiplies bfloat16 as if its bits were integers
        return "bfloat16_interpreted" if tensor.dtype == torch.bfloat16 else None

    def bn_stats(self, c):
        with on_device_of(c):
            return launchers().bn_stats(c)

    def bn_scale_shift(self, mean, var, weight, bias, eps):
        with on_device_of(mean):
            return BatchNormVectors(mean, var, *launchers().bn_scale_shift(mean, var, weight, bias, eps))

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
        with on_device_of(c):
            return launchers().bn_add_relu_forward(
                c, scale, shift, residual, residual_scale, residual_shift, relu, save_mask
            )

    def bn_add_relu_backward_reduce(
        self, dy, c, vectors, mask=None, relu=True, shortcut_c=None, shortcut_mean=None
    ):
        activation = activation_vectors(vectors, mask, relu)
        with on_device_of(c):
            return launchers().bn_add_relu_backward_reduce(
                dy, c, vectors.mean, activation, mask, shortcut_c, shortcut_mean
            )

    def bn_backward_coefficients(self, sum_dz, sum_dz_centered, vectors, rows, training):
        with on_device_of(sum_dz):
            dweight, B, K = launchers().bn_backward_coefficients(
                sum_dz, sum_dz_centered, vectors.mean, vectors.invstd, vectors.scale, rows, training
            )
        return BatchNormGrads(dweight, sum_dz, vectors.scale, B, K)

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
        shortcut = None if shortcut_c is None else coefficients(shortcut_grads)
        activation = activation_vectors(vectors, mask, relu)
        with on_device_of(c):
            return launchers().bn_add_relu_backward_input(
                dy, c, activation, coefficients(grads), mask, shortcut_c, shortcut, save_dz
            )

    def relu_backward(self, dy, mask):
        with on_device_of(dy):
            return launchers().relu_backward(dy, mask)

    def bn_relu_maxpool_forward(self, c, scale, shift, kernel_size, stride, padding, save_indices=True):
        with on_device_of(c):
            y, indices = launchers().bn_relu_maxpool_forward(c, scale, shift, kernel_size, stride, padding)
        return y, indices if save_indices else None

    def bn_relu_maxpool_backward_reduce(self, dy, indices, c, vectors, kernel_size, stride, padding):
        with on_device_of(c):
            return launchers().bn_relu_maxpool_backward_reduce(
                dy, indices, c, vectors.mean, kernel_size, stride, padding
            )

    def bn_relu_maxpool_backward_input(self, dy, indices, c, grads, kernel_size, stride, padding):
        with on_device_of(c):
            return launchers().bn_relu_maxpool_backward_input(
                dy, indices, c, coefficients(grads), kernel_size, stride, padding
            )

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
        epilogue = scale, shift, residual, residual_scale, residual_shift, relu, save_mask, save_stats
        with on_device_of(x):
            return Conv1x1Output(
                *launchers().conv1x1_forward(x, weight, bias, stride, in_scale, in_shift, *epilogue)
            )

    def gram(self, c, scale, shift):
        with on_device_of(c):
            return launchers().gram(c, scale, shift)

    def gram_output_stats(self, weight, bias, m, S):
        with on_device_of(weight):
            return launchers().gram_output_stats(weight, bias, m, S)

    def gram_backward_coefficients(self, r, sum_dz, weight, bias, vectors, rows, m=None, S=None, center=None):
        above = vectors.mean, vectors.invstd, vectors.scale
        with on_device_of(weight):
            return GramGrads(
                *launchers().gram_backward_coefficients(r, sum_dz, weight, bias, *above, rows, m, S, center)
            )

    def conv1x1_backward_weight(self, dy, mask, c, scale, shift, center=None):
        with on_device_of(c):
            return launchers().conv1x1_backward_weight(dy, mask, c, scale, shift, center)

    def conv1x1_gram_backward_input(
        self, dy, mask, c, vectors, weight_dz, weight_a=None, center=None, offset=None
    ):
        below = vectors.mean, vectors.scale, vectors.shift
        with on_device_of(c):
            return launchers().conv1x1_gram_backward_input(
                dy, mask, c, *below, weight_dz, weight_a, center, offset
            )

    def conv1x1_backward_input(
        self, dy, c, vectors, grads, weight, relu=True, shortcut_dy=None, shortcut_mask=None
    ):
        activation = activation_vectors(vectors, None, relu)
        with on_device_of(c):
            return launchers().conv1x1_backward_input(
                dy, c, activation, coefficients(grads), weight, shortcut_dy, shortcut_mask
            )
