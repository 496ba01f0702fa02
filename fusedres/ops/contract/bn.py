"""Raw ops of batch normalisation, the addition and ReLU; symbols and formats in `fusedres.ops.contract`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusedres.ops.contract.vectors import BatchNormGrads, BatchNormVectors


class BnStats(NamedTuple):
    """The statistics of a batch, over the P rows of c.

    Accurate at any mean/std ratio (Welford or shifted sums, Chan et al. 1983 merges).

    Returns (mean [C], var [C]), var biased.
    """

    c: Tensor  # [N, C, H, W]


class BnScaleShift(NamedTuple):
    """The five vectors of one layer, from batch statistics or from running ones.

    Computed in float64, rounded once to the dtype of `mean`; `shift` from the rounded `scale`, so that their errors
    cancel.

    Returns BatchNormVectors, of which mean and var are the arguments.
    """

    mean: Tensor  # [C]
    var: Tensor  # [C]
    weight: Tensor | None  # [C] of any floating dtype; None: 1
    bias: Tensor | None  # [C] of any floating dtype; None: 0
    eps: float


class BnAddReluForward(NamedTuple):
    """`y = relu(scale*c + shift + r)`.

    r is absent, or `residual` as it is, or, with `residual_scale` and `residual_shift`,
    `residual_scale*residual + residual_shift`: the raw convolution output of a projection shortcut.
    The sum is formed in the accumulation dtype and rounded once. relu propagates NaN.

    Returns (y [N, C, H, W] in c's dtype, its packed mask if `save_mask`, else None).
    """

    c: Tensor  # [N, C, H, W]
    scale: Tensor  # [C]
    shift: Tensor  # [C]
    residual: Tensor | None = None  # [N, C, H, W]
    residual_scale: Tensor | None = None  # [C]
    residual_shift: Tensor | None = None  # [C]
    relu: bool = True
    save_mask: bool = False
    reuse_c: bool = False  # the caller is done with c: y may take its storage


class BnAddReluBackwardReduce(NamedTuple):
    """The sums of BN's backward: `sum dz`, `sum dz*(c - mean)` and, for a projection, `sum dz*(shortcut_c -
    shortcut_mean)`.

    dz is formed from dy and, in this order: `mask`, if given; the sign of the rounded `scale*c + shift`, if `relu`
    (the activation inside a block, whose mask is made again); dy itself.

    Returns (sum_dz [C], sum_dz_centered [C], the projection's sum [C] or None).
    """

    dy: Tensor  # [N, C, H, W]
    c: Tensor  # [N, C, H, W]
    vectors: BatchNormVectors
    mask: Tensor | None = None  # packed
    relu: bool = True
    shortcut_c: Tensor | None = None  # [N, C, H, W]
    shortcut_mean: Tensor | None = None  # [C]


class BnBackwardCoefficients(NamedTuple):
    """BN's parameter gradients and coefficients, from the two sums of `BnAddReluBackwardReduce` and P = rows.

    dbias = sum_dz;  dweight = invstd*sum_dz_centered;  A = scale
    training: B = -scale*invstd*dweight/P,  K = -A*dbias/P - B*mean;  else B = K = None

    Returns BatchNormGrads, of which dbias and A are arguments.
    """

    sum_dz: Tensor  # [C]
    sum_dz_centered: Tensor  # [C]
    vectors: BatchNormVectors
    rows: int
    training: bool


class BnAddReluBackwardInput(NamedTuple):
    """`dc = A*dz + B*c + K`, and the gradient of the residual. dz as in `BnAddReluBackwardReduce`.

    Returns (dc [N, C, H, W], the residual's gradient [N, C, H, W] or None). The latter is
    `shortcut_A*dz + shortcut_B*shortcut_c + shortcut_K` for a projection (shortcut_c and shortcut_grads given), dz
    itself if `save_dz` (the identity: the shortcut's gradient *is* dz), else None.
    """

    dy: Tensor  # [N, C, H, W]
    c: Tensor  # [N, C, H, W]
    vectors: BatchNormVectors
    grads: BatchNormGrads
    mask: Tensor | None = None  # packed
    relu: bool = True
    shortcut_c: Tensor | None = None  # [N, C, H, W]
    shortcut_grads: BatchNormGrads | None = None
    save_dz: bool = False
    reuse_dy: bool = False  # the caller is done with dy: dc may take its storage
    reuse_c: bool = (
        False  # the caller is done with c and shortcut_c: dc and the shortcut's gradient may take theirs
    )


class ReluBackward(NamedTuple):
    """`dz = where(mask, dy, 0)`: the gradient of a shortcut by itself. Returns dz, like dy."""

    dy: Tensor  # [N, C, H, W]
    mask: Tensor  # packed
