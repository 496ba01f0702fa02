"""The statistics of a BN in a block: forward from a batch's moments to the BN's vectors, backward from two sums to its
gradients.

Every recipe and the stem come through these two functions: what is to hold for more than this process's rows, as in a
synchronised BN, is reduced here, between a kernel that sums and a kernel that applies.
"""

from __future__ import annotations

from torch import Tensor

from fusedres.blocks.config import ConvBNConfig, ConvBNTensors
from fusedres.ops.contract import (
    BatchNormGrads,
    BatchNormVectors,
    BnBackwardCoefficients,
    BnScaleShift,
    accumulation_dtype,
)
from fusedres.ops.dispatch import Dispatcher


def rows(c: Tensor) -> int:
    """P, the positions one channel has in c [N, C, H, W]."""
    return c.shape[0] * c.shape[2] * c.shape[3]


def vectors_of_batch(
    ops: Dispatcher, unit: ConvBNConfig, t: ConvBNTensors, mean: Tensor, var: Tensor
) -> BatchNormVectors:
    """The vectors of a BN that normalises by the batch, from the moments [C] of its input; var is biased."""
    return ops(BnScaleShift(mean, var, t.bn_weight, t.bn_bias, unit.eps))


def frozen_vectors(
    ops: Dispatcher, unit: ConvBNConfig, t: ConvBNTensors, like: Tensor
) -> BatchNormVectors | None:
    """The vectors of a BN with frozen statistics, for activations of like's dtype; None if the batch's are used."""
    if unit.training:
        return None
    assert t.mean is not None and t.var is not None
    acc = accumulation_dtype(like.dtype)
    return ops(BnScaleShift(t.mean.to(acc), t.var.to(acc), t.bn_weight, t.bn_bias, unit.eps))


def grads_of_batch(
    ops: Dispatcher,
    unit: ConvBNConfig,
    vectors: BatchNormVectors,
    c: Tensor,
    sum_dz: Tensor,
    sum_dz_centered: Tensor,
) -> BatchNormGrads:
    """The parameter gradients of a BN and the coefficients of `dc = A*dz + B*c + K`.

    Args:
        c: the BN's input [N, C, H, W], of which only the size is read.
        sum_dz, sum_dz_centered: `sum dz` and `sum dz*(c - mean)` [C] over its rows.
    """
    return ops(BnBackwardCoefficients(sum_dz, sum_dz_centered, vectors, rows(c), unit.training))
