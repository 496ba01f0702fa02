"""Batch normalisation, the addition and ReLU; see `fusedres.ops.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops.backend import Function
from fusedres.ops.contract import (
    BatchNormGrads,
    BatchNormVectors,
    BnAddReluBackwardInput,
    BnAddReluBackwardReduce,
    BnAddReluForward,
    BnBackwardCoefficients,
    BnScaleShift,
    BnStats,
    ReluBackward,
    accumulation_dtype,
)
from fusedres.ops.reference.values import (
    apply_coefficients,
    masked_gradient,
    normalised,
    rectified,
    selected,
    sums,
)


def bn_stats(op: BnStats) -> tuple[Tensor, Tensor]:
    c = op.c.to(accumulation_dtype(op.c.dtype))
    var, mean = torch.var_mean(c, (0, 2, 3), correction=0)
    # one infinity makes the variance NaN and the mean infinite; Welford's updates lose the latter in inf - inf
    return torch.where(mean.isnan(), c.mean((0, 2, 3)), mean), var


def bn_scale_shift(op: BnScaleShift) -> BatchNormVectors:
    mean, var, weight, bias, eps = op
    invstd = (var.double() + eps).rsqrt()
    scale = (invstd.clone() if weight is None else weight.double() * invstd).to(mean.dtype)
    shift = -mean.double() * scale.double()
    shift = shift if bias is None else shift + bias.double()
    return BatchNormVectors(mean, var, invstd.to(mean.dtype), scale, shift.to(mean.dtype))


def bn_add_relu_forward(op: BnAddReluForward) -> tuple[Tensor, Tensor | None]:
    z = normalised(op.c, op.scale, op.shift, op.residual, op.residual_scale, op.residual_shift)
    return rectified(z.to(op.c.dtype), op.relu, op.save_mask)


def bn_add_relu_backward_reduce(op: BnAddReluBackwardReduce) -> tuple[Tensor, Tensor, Tensor | None]:
    dz = masked_gradient(op.dy, op.c, op.vectors, op.mask, op.relu)
    sum_dz, sum_dz_centered = sums(dz, op.c, op.vectors.mean)
    if op.shortcut_c is None or op.shortcut_mean is None:
        return sum_dz, sum_dz_centered, None
    return sum_dz, sum_dz_centered, sums(dz, op.shortcut_c, op.shortcut_mean)[1]


def bn_backward_coefficients(op: BnBackwardCoefficients) -> BatchNormGrads:
    sum_dz, sum_dz_centered, vectors, rows, training = op
    invstd, A = vectors.invstd, vectors.scale
    dweight = invstd * sum_dz_centered
    if not training:
        return BatchNormGrads(dweight, sum_dz, A, None, None)
    B = (-A.double() * invstd.double() ** 2 * sum_dz_centered.double() / rows).to(A.dtype)
    K = -A.double() * sum_dz.double() / rows - B.double() * vectors.mean.double()
    return BatchNormGrads(dweight, sum_dz, A, B, K.to(A.dtype))


def bn_add_relu_backward_input(op: BnAddReluBackwardInput) -> tuple[Tensor, Tensor | None]:
    dz = masked_gradient(op.dy, op.c, op.vectors, op.mask, op.relu)
    dc = apply_coefficients(dz, op.c, op.grads, op.vectors.mean)
    if op.shortcut_c is not None and op.shortcut_grads is not None:
        return dc, apply_coefficients(dz, op.shortcut_c, op.shortcut_grads)
    # a copy: without a mask dz may be dy itself, and no output shares storage with an argument
    return dc, torch.empty_like(op.c).copy_(dz) if op.save_dz else None


def relu_backward(op: ReluBackward) -> Tensor:
    return torch.empty_like(op.dy).copy_(selected(op.dy, op.mask))


FUNCTIONS: dict[type, Function] = {
    BnStats: bn_stats,
    BnScaleShift: bn_scale_shift,
    BnAddReluForward: bn_add_relu_forward,
    BnAddReluBackwardReduce: bn_add_relu_backward_reduce,
    BnBackwardCoefficients: bn_backward_coefficients,
    BnAddReluBackwardInput: bn_add_relu_backward_input,
    ReluBackward: relu_backward,
}
