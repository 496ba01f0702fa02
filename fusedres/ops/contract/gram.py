"""Raw ops of a 1x1 convolution under BN whose output is never stored, derived in `fusedres.blocks.gram`; symbols and
formats in `fusedres.ops.contract`.

Everywhere `a = relu(scale*c + shift)`, rounded, is the convolution's input.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusedres.ops.contract.vectors import BatchNormVectors


class Gram(NamedTuple):
    """First two moments of a, over the P rows: `m = E[a]`, and the centred `S = E[(a-m)(a-m)^T]`, symmetric.

    Returns (m [Cin], S [Cin, Cin]), in the accumulation dtype.
    """

    c: Tensor  # [N, Cin, H, W]
    scale: Tensor  # [Cin]
    shift: Tensor  # [Cin]


class GramOutputStats(NamedTuple):
    """The statistics of the 1x1 convolution of an activation with the moments m and S of `Gram`.

    mean = W m + bias;  var = max(diag(W S W^T), 0);  center: m as a value of the activation dtype. Where the ReLU gave
    0, `a - center` is exact: with m itself one rounding error would repeat in every such row.
    Computed in float64, rounded once to the dtype of m.

    Returns (mean [Cout], var [Cout], center [Cin]).
    """

    weight: Tensor  # [Cout, Cin, 1, 1], in the activation dtype, as the product uses it
    bias: Tensor | None  # [Cout], in the activation dtype
    m: Tensor  # [Cin]
    S: Tensor  # [Cin, Cin]


class GramGrads(NamedTuple):
    """Result of `GramBackwardCoefficients`: the gradients of the parameters, and the coefficients of
    `Conv1x1GramBackwardInput`. weight_a and offset are None with frozen statistics.
    """

    dweight: Tensor  # [Cout], of the BN's weight
    dW: Tensor  # [Cout, Cin], of the convolution's
    weight_dz: Tensor  # [Cout, Cin]
    weight_a: Tensor | None  # [Cin, Cin]
    offset: Tensor | None  # [Cin]


class GramBackwardCoefficients(NamedTuple):
    """From Rc and `sum dz` of `Conv1x1BackwardWeight`, and P = rows; dweight, A, B as in `BnBackwardCoefficients`.

    batch statistics: R = Rc - outer(sum_dz, m - center),  sum_dz_centered = rowsum(R*W)
        dW = A[:,None]*R + B[:,None]*(W (P*S)),  weight_dz = A[:,None]*W,  weight_a = W^T (B[:,None]*W)
        offset = -(sum_dz/P) weight_dz - (m - center) weight_a
    frozen (m, S, center None; Rc = dz^T a): sum_dz_centered = rowsum(Rc*W) + (bias - mean)*sum_dz
        dW = A[:,None]*Rc,  weight_dz = A[:,None]*W

    Computed in float64, rounded once, to the accumulation dtype. Returns GramGrads.
    """

    r: Tensor  # [Cout, Cin]
    sum_dz: Tensor  # [Cout]
    weight: Tensor  # [Cout, Cin, 1, 1], in the activation dtype
    bias: Tensor | None  # [Cout], in the activation dtype
    vectors: BatchNormVectors  # of the BN above
    rows: int
    m: Tensor | None = None  # [Cin], as in `Gram`
    S: Tensor | None = None  # [Cin, Cin], as in `Gram`
    center: Tensor | None = None  # [Cin], that of `Conv1x1BackwardWeight`


class Conv1x1BackwardWeight(NamedTuple):
    """`Rc = dz^T (a - center)` and `dbias = sum dz`, in the accumulation dtype always.

    a - center may round, but not all rows alike: a backend may subtract a pivot first, and
    `outer(dbias, center - pivot)` from the sums, in float32.

    Returns (Rc [Cout, Cin], dbias [Cout]).
    """

    dy: Tensor  # [N, Cout, H, W]
    mask: Tensor | None  # packed, of y; None: dz = dy
    c: Tensor  # [N, Cin, H, W]
    scale: Tensor  # [Cin]
    shift: Tensor  # [Cin]
    center: Tensor | None = None  # [Cin]; None: 0


class Conv1x1GramBackwardInput(NamedTuple):
    """Input gradient of the convolution, through the ReLU below, and the sums of the BN below.

    `da = dz weight_dz + (a - center) weight_a + offset`, one product with a concatenated inner dimension;
    `dz_below = where(a <= 0, 0, da)`, rounded; the sums are of the rounded values.
    weight_a, center and offset are None together: frozen statistics. Where a backend rounds the weights to the
    activation dtype, it keeps what that leaves: dz, a and the ReLU's mask below go together, so its errors would not
    average out.

    Returns (dz_below [N, Cin, H, W], sum dz_below [Cin], sum dz_below*(c - mean) [Cin]).
    """

    dy: Tensor  # [N, Cout, H, W]
    mask: Tensor | None  # packed, of y; None: dz = dy
    c: Tensor  # [N, Cin, H, W]
    vectors: BatchNormVectors  # of the BN below
    weight_dz: Tensor  # [Cout, Cin], this and the next three in the accumulation dtype
    weight_a: Tensor | None = None  # [Cin, Cin]
    center: Tensor | None = None  # [Cin]
    offset: Tensor | None = None  # [Cin]
