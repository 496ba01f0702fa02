"""A 1x1 convolution under BN whose output is never stored; see `fusedres.ops.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops.backend import Function
from fusedres.ops.contract import (
    BnBackwardCoefficients,
    Conv1x1BackwardWeight,
    Conv1x1GramBackwardInput,
    Gram,
    GramBackwardCoefficients,
    GramGrads,
    GramOutputStats,
)
from fusedres.ops.reference.bn import bn_backward_coefficients
from fusedres.ops.reference.values import activation, rows_by_channels, selected, sums, weight_matrix


def gram(op: Gram) -> tuple[Tensor, Tensor]:
    a = rows_by_channels(activation(op.c, op.scale, op.shift)).double()  # [P, Cin]
    m = a.mean(0)
    centered = a - m
    upper = (centered.t() @ centered / a.shape[0]).triu()
    return m.to(op.scale.dtype), (upper + upper.triu(1).t()).to(op.scale.dtype)


def gram_output_stats(op: GramOutputStats) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, m, S = op
    w = weight_matrix(weight)
    mean = w @ m.double()
    mean = mean if bias is None else mean + bias.double()
    var = ((w @ S.double()) * w).sum(1).clamp_(min=0)
    return mean.to(m.dtype), var.to(m.dtype), m.to(weight.dtype, copy=True).to(m.dtype)


def gram_backward_coefficients(op: GramBackwardCoefficients) -> GramGrads:
    r, sum_dz, weight, bias, vectors, rows, m, S, center = op
    w, r, sum_dz64, acc = weight_matrix(weight), r.double(), sum_dz.double(), sum_dz.dtype
    if m is None or S is None or center is None:
        level = -vectors.mean.double() if bias is None else bias.double() - vectors.mean.double()
        centered = (r * w).sum(1) + level * sum_dz64
    else:
        rest = m.double() - center.double()
        r = r - torch.outer(sum_dz64, rest)
        centered = (r * w).sum(1)
    grads = bn_backward_coefficients(
        BnBackwardCoefficients(sum_dz, centered.to(acc), vectors, rows, m is not None)
    )
    A = grads.A.double()[:, None]
    dW, weight_dz = A * r, A * w
    if grads.B is None or S is None:
        return GramGrads(grads.dweight, dW.to(acc), weight_dz.to(acc), None, None)
    B = grads.B.double()[:, None]
    dW = dW + B * (w @ (S.double() * rows))
    weight_a = w.t() @ (B * w)
    offset = -(sum_dz64 / rows) @ weight_dz - rest @ weight_a
    return GramGrads(grads.dweight, dW.to(acc), weight_dz.to(acc), weight_a.to(acc), offset.to(acc))


def conv1x1_backward_weight(op: Conv1x1BackwardWeight) -> tuple[Tensor, Tensor]:
    acc = op.scale.dtype
    dz = rows_by_channels(selected(op.dy, op.mask)).to(acc)  # [P, Cout]
    a = rows_by_channels(activation(op.c, op.scale, op.shift)).to(acc)  # [P, Cin]
    return dz.t() @ (a if op.center is None else a - op.center), dz.sum(0)


def conv1x1_gram_backward_input(op: Conv1x1GramBackwardInput) -> tuple[Tensor, Tensor, Tensor]:
    c, vectors = op.c, op.vectors
    n, channels, h, w = c.shape
    acc = vectors.scale.dtype
    a = rows_by_channels(activation(c, vectors.scale, vectors.shift)).to(acc)  # [P, Cin]
    da = rows_by_channels(selected(op.dy, op.mask)).to(acc) @ op.weight_dz  # [P, Cin]
    if op.weight_a is not None and op.center is not None and op.offset is not None:
        da = da + (a - op.center) @ op.weight_a + op.offset
    dz_below = torch.where(a <= 0, 0, da).view(n, h, w, channels).permute(0, 3, 1, 2)
    dz_below = torch.empty_like(c).copy_(dz_below)
    return dz_below, *sums(dz_below, c, vectors.mean)


FUNCTIONS: dict[type, Function] = {
    Gram: gram,
    GramOutputStats: gram_output_stats,
    GramBackwardCoefficients: gram_backward_coefficients,
    Conv1x1BackwardWeight: conv1x1_backward_weight,
    Conv1x1GramBackwardInput: conv1x1_gram_backward_input,
}
