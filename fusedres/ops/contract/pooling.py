"""Raw ops of the stem, `maxpool(relu(BN(c)))`; symbols and formats in `fusedres.ops.contract`.

The window is square, kernel_size <= 15, padding <= kernel_size/2, without dilation, in floor mode.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusedres.ops.contract.vectors import BatchNormGrads, BatchNormVectors


class BnReluMaxpoolForward(NamedTuple):
    """`y = maxpool(relu(scale*c + shift))`.

    Compares rounded values in torch's window order, keeps the first maximum, propagates NaN. An index is the place
    kh*kernel_size + kw in the window, or 255 where `y <= 0`: no gradient passes there.

    Returns (y [N, C, H', W'], indices like y in uint8 if `save_indices`, else None).
    """

    c: Tensor  # [N, C, H, W]
    scale: Tensor  # [C]
    shift: Tensor  # [C]
    kernel_size: int
    stride: int
    padding: int
    save_indices: bool = True


class BnReluMaxpoolBackwardReduce(NamedTuple):
    """`sum dz` and `sum dz*(c - mean)`, where dz [N, C, H, W] gathers dy over the indices.

    Returns (sum_dz [C], sum_dz_centered [C]).
    """

    dy: Tensor  # [N, C, H', W']
    indices: Tensor  # [N, C, H', W'], uint8
    c: Tensor  # [N, C, H, W]
    vectors: BatchNormVectors
    kernel_size: int
    stride: int
    padding: int


class BnReluMaxpoolBackwardInput(NamedTuple):
    """`dc = A*dz + B*c + K`, dz as in `BnReluMaxpoolBackwardReduce`. Returns dc, like c."""

    dy: Tensor  # [N, C, H', W']
    indices: Tensor  # [N, C, H', W'], uint8
    c: Tensor  # [N, C, H, W]
    grads: BatchNormGrads
    kernel_size: int
    stride: int
    padding: int
