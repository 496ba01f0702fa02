"""The compiled kernels of `csrc/` as a backend: an adapter from `RawOps` to the ops of `fusedres_native`.

The library is `libfusedres_native.so` beside the package; `load` brings it in. What it does not serve gets a reason
from `supports`: `fusedres.backends.native_reasons`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch.autograd.graph import increment_version  # autograd does not see what a kernel of ours writes into

from fusedres.backends import native_file
from fusedres.backends.native_reasons import REASONS
from fusedres.errors import BackendUnavailableError
from fusedres.raw_ops import BatchNormGrads, BatchNormVectors, Conv1x1Output, RawOps

LIBRARY = Path(__file__).resolve().parent.parent / "libfusedres_native.so"
LIBRARY_OPS = (
    "bn_stats",
    "bn_scale_shift",
    "bn_add_relu_forward",
    "bn_add_relu_backward_reduce",
    "bn_backward_coefficients",
    "bn_add_relu_backward_input",
    "relu_backward",
    "bn_relu_maxpool_forward",
    "bn_relu_maxpool_backward_reduce",
    "bn_relu_maxpool_backward_input",
    "conv1x1_forward",
    "conv_backward_input",
    "conv_backward_input_",
    "conv_backward_weight",
    "cpu_capability",
    "cpu_multiplies_bfloat16",
    "cpu_products_of_bfloat16",
    "cuda_archs",
    "cuda_version",
    "cuda_device_problem",
)


def is_built() -> bool:
    """Whether this installation has the compiled library, loadable or not."""
    return LIBRARY.is_file()


@cache
def load() -> None:
    """Loads the library, once; after this `torch.ops.fusedres_native` has the operators.

    Raises:
        BackendUnavailableError: it is not there, not whole, or not loadable into this process, with this torch or on
            this processor.
    """
    if not is_built():
        raise BackendUnavailableError(
            f"fusedres: the native backend needs {LIBRARY}, which is not there. "
            "Install a wheel that has it, or build from source with g++: "
            "FUSEDRES_BUILD=cpu pip install --no-build-isolation ."
        )
    if (problem := native_file.problem(LIBRARY)) is not None:
        raise BackendUnavailableError(f"fusedres: {LIBRARY} is not loaded: {problem}")
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise BackendUnavailableError(
            f"fusedres: {LIBRARY} does not load with torch {torch.__version__}: {error}. "
            "Reinstall fusedres for this torch, or use backend='reference'."
        ) from error
    missing = [op for op in LIBRARY_OPS if not hasattr(torch.ops.fusedres_native, op)]
    if missing:
        raise BackendUnavailableError(
            f"fusedres: {LIBRARY} was built from other sources, it lacks {', '.join(missing)}. "
            "Build it again with the package: pip install --no-build-isolation ."
        )
    if torch.ops.fusedres_native.cpu_capability() == "none":
        raise BackendUnavailableError(
            "fusedres: the native backend needs a processor with AVX2 and FMA. Use backend='reference'."
        )


def loaders() -> dict[str, Callable[[], RawOps]]:
    """{"native": NativeOps} where the library loads, else {}; warns where it is there and does not load."""
    if not is_built():
        return {}
    try:
        load()
    except BackendUnavailableError as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        return {}
    return {NativeOps.name: cast(Callable[[], RawOps], NativeOps)}


def instruction_set() -> str | None:
    """What the CPU kernels use on this processor: "avx2" or "avx512"; None where the library is not loaded."""
    ask = getattr(torch.ops.fusedres_native, "cpu_capability", None)
    return ask() if ask else None


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16; False where the library is not loaded."""
    ask = getattr(torch.ops.fusedres_native, "cpu_multiplies_bfloat16", None)
    return bool(ask and ask())


class NativeOps:
    """`RawOps` in compiled code."""

    name = "native"

    def __init__(self) -> None:
        load()
        self._ops = torch.ops.fusedres_native

    def supports(self, op: str, *args: Any, **kwargs: Any) -> str | None:
        reason = REASONS.get(op)
        return "no_kernel" if reason is None else reason(*args, **kwargs)

    def bn_stats(self, c):
        return self._ops.bn_stats(c)

    def bn_scale_shift(self, mean, var, weight, bias, eps):
        return BatchNormVectors(mean, var, *self._ops.bn_scale_shift(mean, var, weight, bias, eps))

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
        args = c, scale, shift, residual, residual_scale, residual_shift, relu
        if reuse_c and not save_mask and c.device.type == "cpu":
            self._ops.bn_add_relu_forward_(*args)
            increment_version(c)
            return c, None
        return self._ops.bn_add_relu_forward(*args, save_mask)

    def bn_add_relu_backward_reduce(
        self, dy, c, vectors, mask=None, relu=True, shortcut_c=None, shortcut_mean=None
    ):
        v = vectors
        return self._ops.bn_add_relu_backward_reduce(
            dy, c, v.mean, v.scale, v.shift, mask, relu, shortcut_c, shortcut_mean
        )

    def bn_backward_coefficients(self, sum_dz, sum_dz_centered, vectors, rows, training):
        v = vectors
        dweight, B, K = self._ops.bn_backward_coefficients(
            sum_dz, sum_dz_centered, v.mean, v.invstd, v.scale, rows, training
        )
        return BatchNormGrads(dweight, sum_dz, v.scale, B, K)

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
        v, g = vectors, grads
        if reuse_dy and shortcut_c is None and not save_dz and dy.device.type == "cpu":
            self._ops.bn_add_relu_backward_input_(dy, c, v.scale, v.shift, g.A, g.B, g.K, mask, relu)
            increment_version(dy)
            return dy, None
        shortcut = (None, None, None) if shortcut_grads is None else shortcut_grads[2:]
        args = dy, c, v.scale, v.shift, g.A, g.B, g.K, mask, relu, shortcut_c, *shortcut, save_dz
        if reuse_c and c.device.type == "cpu":
            dz = self._ops.bn_add_relu_backward_input_of_c_(*args)
            increment_version(c if shortcut_c is None else (c, shortcut_c))
            return c, dz if shortcut_c is None else shortcut_c
        return self._ops.bn_add_relu_backward_input(*args)

    def relu_backward(self, dy, mask):
        return self._ops.relu_backward(dy, mask)

    def bn_relu_maxpool_forward(self, c, scale, shift, kernel_size, stride, padding, save_indices=True):
        return self._ops.bn_relu_maxpool_forward(c, scale, shift, kernel_size, stride, padding, save_indices)

    def bn_relu_maxpool_backward_reduce(self, dy, indices, c, vectors, kernel_size, stride, padding):
        return self._ops.bn_relu_maxpool_backward_reduce(
            dy, indices, c, vectors.mean, kernel_size, stride, padding
        )

    def bn_relu_maxpool_backward_input(self, dy, indices, c, grads, kernel_size, stride, padding):
        return self._ops.bn_relu_maxpool_backward_input(
            dy, indices, c, grads.A, grads.B, grads.K, kernel_size, stride, padding
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
        epilogue = scale, shift, residual, residual_scale, residual_shift, relu
        return Conv1x1Output(self._ops.conv1x1_forward(x, weight, *epilogue), None, None, None)

    def conv_backward_weight(self, dy, x, kernel_size, stride, padding, dilation, groups):
        return self._ops.conv_backward_weight(dy, x, *kernel_size, *stride, *padding, *dilation)

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
        in_place = shortcut_dy is not None and shortcut_mask is None and reuse_shortcut
        if tuple(stride) == (1, 1) and not in_place:
            return self._ops.conv_backward_input(dy, weight, shortcut_dy, shortcut_mask)
        dx = shortcut_dy if in_place else shortcut_dy.clone()
        self._ops.conv_backward_input_(dx, dy, weight, *stride)
        increment_version(dx)
        return dx
