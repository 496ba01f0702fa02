"""The contract: every raw op of fusedres, with its maths, shapes, dtypes and memory format.

Every backend implements `RawOps` with these names and signatures; everything above is built on it.

Symbols
    N, C, H, W   batch, channels, height, width; rows P = N*H*W, the positions one channel has
    c            a raw convolution output            [N, C, H, W]
    a            an activation, after ReLU           [N, C, H, W]
    y            a block's output                    [N, C, H, W]
    d<name>      the gradient of <name>, like <name>
    dz           the gradient where it enters BN: `where(y <= 0, 0, dy)`, a select and never a product

Memory format
    Activations have logical shape [N, C, H, W]. An output takes the memory format of the tensor it is the
    gradient of, or else of `c`, `x` or `dy`, in this order. The native and Triton backends need channels_last
    ("NHWC": a row's C values lie side by side); the reference takes any.

Dtypes
    Activations and convolution weights: float16, bfloat16, float32, float64, one dtype per call.
    Channel vectors [C] and statistics: the accumulation dtype, float64 for float64 activations and float32
    otherwise. Sums are accumulated in it, in a fixed order: two runs are bitwise equal.
    Values are rounded to the activation dtype exactly where an activation is stored, and masks are taken
    from the rounded value.

Mask
    One bit an element, packed in uint8 of length ceil(N*C*H*W / 8): bit i of byte j belongs to element 8j+i
    of the tensor in NHWC order. A set bit means the gradient passes: `not (y <= 0)`, so NaN passes, as in torch.
    Bits past the last element are 0.

Kernels are pure: they never update running statistics, and write an argument only where the caller gives it away
(`reuse_c`, `reuse_dy`, `reuse_shortcut`), which a backend may ignore.
Formulas: Ioffe & Szegedy 2015 (batch normalisation); the Gram identity is derived in `fusedres.blocks.gram`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

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


class Conv1x1Output(NamedTuple):
    """Result of `conv1x1_forward`; the parts that were not asked for are None."""

    y: Tensor  # [N, Cout, H', W']
    mask: Tensor | None  # packed bits of y
    mean: Tensor | None  # [Cout] of the rounded y
    var: Tensor | None  # [Cout] biased


class GramGrads(NamedTuple):
    """Backward of BN over a 1x1 convolution whose output was never stored: the gradients of the parameters, and the
    coefficients of `conv1x1_gram_backward_input`. weight_a and offset are None with frozen statistics.
    """

    dweight: Tensor  # [Cout], of the BN's weight
    dW: Tensor  # [Cout, Cin], of the convolution's
    weight_dz: Tensor  # [Cout, Cin]
    weight_a: Tensor | None  # [Cin, Cin]
    offset: Tensor | None  # [Cin]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of channel vectors and sums for activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class RawOps(Protocol):
    """One backend. Argument names and order are the same in every backend."""

    name: str

    def supports(self, op: str, *args: object, **kwargs: object) -> str | None:
        """None if this backend serves `op` on these arguments, else why not (a short code).

        Looks at shapes, dtypes, strides and devices only, never at values.
        """

    # ---------------------------------------------------------------- batch normalisation

    def bn_stats(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """`mean`, biased `var` over the P rows of c [N, C, H, W], each [C].

        Accurate at any mean/std ratio (Welford or shifted sums, Chan et al. 1983 merges).
        """

    def bn_scale_shift(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> BatchNormVectors:
        """The five vectors of one layer, from batch statistics or from running ones.

        mean, var [C]; weight, bias [C] of any floating dtype, None for 1 and 0. Computed in float64, rounded
        once to the dtype of `mean`; `shift` from the rounded `scale`, so that their errors cancel.
        """

    def bn_add_relu_forward(
        self,
        c: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None = None,
        residual_scale: Tensor | None = None,
        residual_shift: Tensor | None = None,
        relu: bool = True,
        save_mask: bool = False,
        reuse_c: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`y = relu(scale*c + shift + r)`, y [N, C, H, W] in c's dtype, and its packed mask if `save_mask`.

        r is absent, or `residual` [N, C, H, W] as it is, or, with `residual_scale` and `residual_shift` [C],
        `residual_scale*residual + residual_shift`: the raw convolution output of a projection shortcut.
        The sum is formed in the accumulation dtype and rounded once. relu propagates NaN.
        `reuse_c`: the caller is done with c, y may take its storage.
        """

    def bn_add_relu_backward_reduce(
        self,
        dy: Tensor,
        c: Tensor,
        vectors: BatchNormVectors,
        mask: Tensor | None = None,
        relu: bool = True,
        shortcut_c: Tensor | None = None,
        shortcut_mean: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`sum dz`, `sum dz*(c - mean)` and, for a projection, `sum dz*(shortcut_c - shortcut_mean)`, each [C].

        dz is formed from dy and, in this order: `mask`, if given; the sign of the rounded `scale*c + shift`,
        if `relu` (the activation inside a block, whose mask is made again); dy itself.
        """

    def bn_backward_coefficients(
        self,
        sum_dz: Tensor,
        sum_dz_centered: Tensor,
        vectors: BatchNormVectors,
        rows: int,
        training: bool,
    ) -> BatchNormGrads:
        """From the two sums [C] of `bn_add_relu_backward_reduce`, and P = rows:

        dbias = sum_dz;  dweight = invstd*sum_dz_centered;  A = scale
        training: B = -scale*invstd*dweight/P,  K = -A*dbias/P - B*mean;  else B = K = None
        """

    def bn_add_relu_backward_input(
        self,
        dy: Tensor,
        c: Tensor,
        vectors: BatchNormVectors,
        grads: BatchNormGrads,
        mask: Tensor | None = None,
        relu: bool = True,
        shortcut_c: Tensor | None = None,
        shortcut_grads: BatchNormGrads | None = None,
        save_dz: bool = False,
        reuse_dy: bool = False,
        reuse_c: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`dc = A*dz + B*c + K` [N, C, H, W], and the gradient of the residual.

        The second result is `shortcut_A*dz + shortcut_B*shortcut_c + shortcut_K` for a projection
        (shortcut_c and shortcut_grads given), dz itself if `save_dz` (the identity: the shortcut's gradient
        *is* dz), else None. dz as in `bn_add_relu_backward_reduce`.
        `reuse_dy`: the caller is done with dy, dc may take its storage. `reuse_c`: it is done with c and shortcut_c,
        dc and the shortcut's gradient may take theirs.
        """

    def relu_backward(self, dy: Tensor, mask: Tensor) -> Tensor:
        """`dz = where(mask, dy, 0)`, like dy [N, C, H, W]: the gradient of a shortcut by itself."""

    # ---------------------------------------------------------------- stem

    def bn_relu_maxpool_forward(
        self,
        c: Tensor,
        scale: Tensor,
        shift: Tensor,
        kernel_size: int,
        stride: int,
        padding: int,
        save_indices: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """`y = maxpool(relu(scale*c + shift))` [N, C, H', W'] and `indices`, uint8, like y, or None.

        Compares rounded values in torch's window order, keeps the first maximum, propagates NaN. An index is
        the place kh*kernel_size + kw in the window, or 255 where `y <= 0`: no gradient passes there.
        Square window, kernel_size <= 15, padding <= kernel_size/2, no dilation, floor mode.
        """

    def bn_relu_maxpool_backward_reduce(
        self,
        dy: Tensor,
        indices: Tensor,
        c: Tensor,
        vectors: BatchNormVectors,
        kernel_size: int,
        stride: int,
        padding: int,
    ) -> tuple[Tensor, Tensor]:
        """`sum dz` and `sum dz*(c - mean)`, each [C], where dz [N, C, H, W] gathers dy over the indices."""

    def bn_relu_maxpool_backward_input(
        self,
        dy: Tensor,
        indices: Tensor,
        c: Tensor,
        grads: BatchNormGrads,
        kernel_size: int,
        stride: int,
        padding: int,
    ) -> Tensor:
        """`dc = A*dz + B*c + K` [N, C, H, W]."""

    # ---------------------------------------------------------------- 1x1 convolutions

    def conv1x1_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int = 1,
        in_scale: Tensor | None = None,
        in_shift: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        residual_scale: Tensor | None = None,
        residual_shift: Tensor | None = None,
        relu: bool = False,
        save_mask: bool = False,
        save_stats: bool = False,
    ) -> Conv1x1Output:
        """`conv = a W^T + bias`, then the epilogue of `bn_add_relu_forward`.

        x [N, Cin, H, W]; weight [Cout, Cin, 1, 1]; bias [Cout]. Prologue: `a = relu(in_scale*x + in_shift)`,
        rounded, if in_scale is given, else a = x. Epilogue: with scale, shift [Cout] the value
        `relu(scale*conv + shift + r)`, conv not rounded in between; without, conv itself.
        `save_stats`: mean and var of the rounded y (for an epilogue-free call).
        """

    def gram(self, c: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """First two moments of `a = relu(scale*c + shift)`, rounded: `m = E[a]` [Cin] and the centred
        `S = E[(a-m)(a-m)^T]` [Cin, Cin], symmetric, in the accumulation dtype; expectations over the P rows.
        """

    def gram_output_stats(
        self, weight: Tensor, bias: Tensor | None, m: Tensor, S: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`mean = W m + bias` and `var = max(diag(W S W^T), 0)` [Cout] of the 1x1 convolution of an activation with
        the moments m [Cin], S [Cin, Cin] of `gram`; and `center` [Cin]: m as a value of the activation dtype.

        weight [Cout, Cin, 1, 1], bias [Cout] in the activation dtype, as the product uses them. Computed in float64,
        rounded once to the dtype of m. Where the ReLU gave 0, `a - center` is exact: with m itself one rounding error
        would repeat in every such row.
        """

    def gram_backward_coefficients(
        self,
        r: Tensor,
        sum_dz: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        vectors: BatchNormVectors,
        rows: int,
        m: Tensor | None = None,
        S: Tensor | None = None,
        center: Tensor | None = None,
    ) -> GramGrads:
        """From Rc [Cout, Cin] and `sum dz` [Cout] of `conv1x1_backward_weight`, and P = rows:

        batch statistics: R = Rc - outer(sum_dz, m - center),  sum_dz_centered = rowsum(R*W)
            dW = A[:,None]*R + B[:,None]*(W (P*S)),  weight_dz = A[:,None]*W,  weight_a = W^T (B[:,None]*W)
            offset = -(sum_dz/P) weight_dz - (m - center) weight_a
        frozen (m, S, center None; Rc = dz^T a): sum_dz_centered = rowsum(Rc*W) + (bias - mean)*sum_dz
            dW = A[:,None]*Rc,  weight_dz = A[:,None]*W

        dweight, A and B as in `bn_backward_coefficients`. weight [Cout, Cin, 1, 1], bias [Cout] in the activation
        dtype; vectors: the BN above; m, S as in `gram`, center that of `conv1x1_backward_weight`. Computed in float64,
        results rounded once, to the accumulation dtype.
        """

    def conv1x1_backward_weight(
        self,
        dy: Tensor,
        mask: Tensor | None,
        c: Tensor,
        scale: Tensor,
        shift: Tensor,
        center: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`Rc = dz^T (a - center)` [Cout, Cin] and `dbias = sum dz` [Cout], in the accumulation dtype always.

        dy [N, Cout, H, W] with the packed mask of y (None: dz = dy); c [N, Cin, H, W] with
        `a = relu(scale*c + shift)`, rounded; center [Cin], None for 0. a - center may round, but not all
        rows alike: a backend may subtract a pivot first, and `outer(dbias, center - pivot)` from the sums, in float32.
        """

    def conv1x1_gram_backward_input(
        self,
        dy: Tensor,
        mask: Tensor | None,
        c: Tensor,
        vectors: BatchNormVectors,
        weight_dz: Tensor,
        weight_a: Tensor | None = None,
        center: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Input gradient of a 1x1 convolution under BN whose output was never stored, through the ReLU below.

        `da = dz weight_dz + (a - center) weight_a + offset`, one product with a concatenated inner dimension;
        `dz_below = where(a <= 0, 0, da)` [N, Cin, H, W], rounded; and of the rounded values
        `sum dz_below` and `sum dz_below*(c - mean)`, each [Cin], for the BN below.
        dy [N, Cout, H, W]; c, vectors: the BN below, `a = relu(scale*c + shift)`, rounded;
        weight_dz [Cout, Cin], weight_a [Cin, Cin], center, offset [Cin] in the accumulation dtype.
        weight_a, center and offset are None together: frozen statistics. Where a backend rounds the weights to the
        activation dtype, it keeps what that leaves: dz, a and the ReLU's mask below go together, so its errors would
        not average out.
        """

    def conv1x1_backward_input(
        self,
        dy: Tensor,
        c: Tensor,
        vectors: BatchNormVectors,
        grads: BatchNormGrads,
        weight: Tensor,
        relu: bool = True,
        shortcut_dy: Tensor | None = None,
        shortcut_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """BN backward, then the input gradient of a 1x1 stride-1 convolution, then the shortcut's gradient.

        `dc = A*dz + B*c + K` [N, Cout, H, W], rounded, dz from dy and the sign of `scale*c + shift` if relu;
        `dx = dc W` [N, Cin, H, W], plus shortcut_dy, taken through shortcut_mask if that is given.
        Returns (dx, dc): dc is the side output that the library's weight gradient reads.
        """

    # ---------------------------------------------------------------- other convolutions

    def conv_backward_weight(
        self,
        dy: Tensor,
        x: Tensor,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> Tensor:
        """`dW` [Cout, Cin/groups, kh, kw] of `conv2d(x, W)`, in the accumulation dtype and x's memory format.

        dy [N, Cout, H', W'], x [N, Cin, H, W]. Sums over the positions that lie inside x: padding is never read.
        """

    def conv_backward_input(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        shortcut_dy: Tensor | None = None,
        shortcut_mask: Tensor | None = None,
        reuse_shortcut: bool = False,
    ) -> Tensor:
        """`dx` [N, Cin, H, W] of `conv2d(x, weight)`, plus shortcut_dy, taken through shortcut_mask if that is given.

        dy [N, Cout, H', W'], weight [Cout, Cin/groups, kh, kw], x [N, Cin, H, W], of which only the form is read,
        shortcut_dy like x. reuse_shortcut: dx may be in the storage of shortcut_dy.
        """


RAW_OPS = tuple(
    name for name in vars(RawOps) if not name.startswith("_") and name not in ("name", "supports")
)
