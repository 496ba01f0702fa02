"""What the raw ops hand to one another beside activations: the channel vectors of one BN, and their dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class BatchNormVectors(NamedTuple):
    """What BN needs of one layer, each [C] in the accumulation dtype.

    `z = scale*c + shift` is the normalised value; `var` is biased (divided by P).
    """

    mean: Tensor
    var: Tensor
    invstd: Tensor  # (var + eps)^-1/2
    scale: Tensor  # weight * invstd
    shift: Tensor  # bias - mean*scale


class BatchNormGrads(NamedTuple):
    """BN's backward for one layer, each [C]: the parameter gradients, and `dc = A*dz + B*c + K`.

    With frozen statistics B and K are None: `dc = A*dz`.
    """

    dweight: Tensor  # sum dz*(c - mean)*invstd
    dbias: Tensor  # sum dz
    A: Tensor
    B: Tensor | None
    K: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of channel vectors and sums for activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
