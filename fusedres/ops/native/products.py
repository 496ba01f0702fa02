"""What the tensor-core products of `csrc/cuda` do not serve, and why; of convolutions on a GPU alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from fusedres.ops.backend import Reason
from fusedres.ops.contract import (
    Conv1x1BackwardInput,
    Conv1x1BackwardWeight,
    Conv1x1Forward,
    Conv1x1GramBackwardInput,
    Conv3x3BackwardInput,
    Conv3x3Forward,
    Gram,
    GramBackwardCoefficients,
    GramOutputStats,
    RawOp,
)
from fusedres.ops.native.reasons import activations_reason, given_reason, vectors_reason

# names of the GPUs on which these kernels were measured to be no slower than what else serves the op
MEASURED_PRODUCTS: frozenset[str] = frozenset()
MOST_CHANNELS = 2**26
WIDEST_LINE = 126  # of the halo of a 3x3 convolution's tile: as `halo_fits` in csrc/cuda/halo_plan.h


def product_reason(x: Tensor, weight: Tensor | None, *others: Tensor | None) -> str | None:
    """Why no product is formed of these activations and this weight, or None."""
    if (reason := activations_reason(x, *others)) is not None:
        return reason
    if x.dtype == torch.float32:
        return "float32_product"
    if weight is not None:
        if weight.dtype != x.dtype:
            return "mixed_dtypes"
        if weight.device != x.device:
            return "mixed_devices"
        pointwise = weight.shape[2:] == (1, 1)  # others are copied
        if pointwise and not weight.is_contiguous(memory_format=torch.channels_last):
            return "not_channels_last"
        if max(weight.shape[:2]) > MOST_CHANNELS:
            return "too_many_channels"
    return None


def bias_reason(bias: Tensor | None, x: Tensor) -> str | None:
    if bias is None:
        return None
    if bias.dtype != x.dtype:
        return "mixed_dtypes"
    return None if bias.is_contiguous() else "vector_not_dense"


def fused_vectors_reason(op: Conv1x1Forward | Conv3x3Forward) -> str | None:
    return given_reason(op.in_scale, op.in_shift, op.scale, op.shift, op.residual_scale, op.residual_shift)


def forward_reason(op: Conv1x1Forward) -> str | None:
    product = product_reason(op.x, op.weight, op.residual)
    return product or bias_reason(op.bias, op.x) or fused_vectors_reason(op)


def forward3x3_reason(op: Conv3x3Forward) -> str | None:
    if op.groups != 1:
        return "groups"
    return product_reason(op.x, op.weight, op.residual) or fused_vectors_reason(op)


def mask_reason(mask: Tensor | None, like: Tensor) -> str | None:
    if mask is None:
        return None
    if mask.device != like.device:
        return "mixed_devices"
    return None if mask.is_contiguous() else "vector_not_dense"


def backward_input_reason(op: Conv1x1BackwardInput) -> str | None:
    v, g = op.vectors, op.grads
    return (
        product_reason(op.c, op.weight, op.dy, op.shortcut_dy)
        or mask_reason(op.shortcut_mask, op.c)
        or given_reason(v.scale, v.shift, g.A, g.B, g.K)
    )


def backward_input3x3_window_reason(op: Conv3x3BackwardInput) -> str | None:
    """With a stride four products of other taps would make dx, and nobody has written them."""
    if op.stride != 1:
        return "stride_or_bias"
    return "too_wide" if op.dy.dim() == 4 and op.dy.shape[3] > WIDEST_LINE else None


def backward_input3x3_reason(op: Conv3x3BackwardInput) -> str | None:
    if (reason := backward_input3x3_window_reason(op)) is not None:
        return reason
    v, g = op.vectors, op.grads
    vectors = () if v is None or g is None else (v.scale, v.shift, g.A, g.B, g.K)
    return (
        product_reason(op.dy, op.weight, op.c, op.shortcut_dy)
        or mask_reason(op.shortcut_mask, op.dy)
        or given_reason(*vectors)
    )


def backward_weight_reason(op: Conv1x1BackwardWeight) -> str | None:
    return (
        product_reason(op.c, None, op.dy)
        or mask_reason(op.mask, op.c)
        or given_reason(op.scale, op.shift, op.center)
    )


def gram_reason(op: Gram) -> str | None:
    return product_reason(op.c, None) or vectors_reason(op.scale, op.shift)


def gram_output_stats_reason(op: GramOutputStats) -> str | None:
    weight = op.weight
    return product_reason(weight, weight) or bias_reason(op.bias, weight) or given_reason(op.m, op.S)


def gram_coefficients_reason(op: GramBackwardCoefficients) -> str | None:
    weight, v = op.weight, op.vectors
    return (
        product_reason(weight, weight)
        or bias_reason(op.bias, weight)
        or given_reason(op.r, op.sum_dz, v.mean, v.invstd, v.scale, op.m, op.S, op.center)
    )


def gram_backward_input_reason(op: Conv1x1GramBackwardInput) -> str | None:
    v = op.vectors
    return (
        product_reason(op.c, None, op.dy)
        or mask_reason(op.mask, op.c)
        or given_reason(v.mean, v.scale, v.shift, op.weight_dz, op.weight_a, op.center, op.offset)
    )


# by the type of its record, the argument that decides where the op runs, and the reason there
PRODUCTS: dict[type, tuple[str, Reason]] = {
    Conv1x1Forward: ("x", forward_reason),
    Conv3x3Forward: ("x", forward3x3_reason),
    Conv3x3BackwardInput: ("dy", backward_input3x3_reason),
    Conv1x1BackwardInput: ("c", backward_input_reason),
    Conv1x1BackwardWeight: ("c", backward_weight_reason),
    Gram: ("c", gram_reason),
    GramOutputStats: ("weight", gram_output_stats_reason),
    GramBackwardCoefficients: ("weight", gram_coefficients_reason),
    Conv1x1GramBackwardInput: ("c", gram_backward_input_reason),
}


@cache
def is_measured(device: torch.device) -> bool:
    return torch.cuda.get_device_name(device) in MEASURED_PRODUCTS


def is_without_rival(op: RawOp) -> bool:
    """Whether neither the library nor Triton has the like: a 3x3 convolution with a BN in its prologue.

    None but recipe `prologue` calls it; whether that pays is for the trial to say.
    """
    if isinstance(op, Conv3x3Forward):
        return op.in_scale is not None
    return isinstance(op, Conv3x3BackwardInput) and op.c is not None


def on_both_devices(reasons: Mapping[type, Reason], measured: bool) -> dict[type, Reason]:
    """The reasons of the ops above: on a GPU those of the products, on a CPU those given, or "no_kernel".

    Args:
        measured: no product is served on a GPU where nobody has measured them, but for those without a rival.
    """

    def reason_of(kind: type) -> Reason:
        deciding, on_gpu = PRODUCTS[kind]
        on_cpu = reasons.get(kind)

        def reason(op: RawOp) -> str | None:
            tensor = getattr(op, deciding)
            if not tensor.is_cuda:
                return "no_kernel" if on_cpu is None else on_cpu(op)
            if measured and not is_without_rival(op) and not is_measured(tensor.device):
                return "product_not_measured"
            return on_gpu(op)

        return reason

    return {**reasons, **{kind: reason_of(kind) for kind in PRODUCTS}}
