"""Raw ops of convolutions, with what is fused to them; symbols and formats in `fusedres.ops.contract`.

Those of a 1x1 convolution under BN whose output is never stored are in `fusedres.ops.contract.gram`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusedres.ops.contract.vectors import BatchNormGrads, BatchNormVectors


class ConvOutput(NamedTuple):
    """Result of a fused convolution; the parts that were not asked for are None."""

    y: Tensor  # [N, Cout, H', W']
    mask: Tensor | None  # packed bits of y
    mean: Tensor | None  # [Cout] of the rounded y
    var: Tensor | None  # [Cout] biased


class Conv1x1Forward(NamedTuple):
    """`conv = a W^T + bias`, then the epilogue of `BnAddReluForward`.

    Prologue: `a = relu(in_scale*x + in_shift)`, rounded, if in_scale is given, else a = x.
    Epilogue: with scale and shift the value `relu(scale*conv + shift + r)`, conv not rounded in between; without,
    conv itself. r as in `BnAddReluForward`.

    Returns ConvOutput: y, its mask if `save_mask`, mean and var of the rounded y if `save_stats` (for a call without
    an epilogue).
    """

    x: Tensor  # [N, Cin, H, W]
    weight: Tensor  # [Cout, Cin, 1, 1]
    bias: Tensor | None = None  # [Cout]
    stride: int = 1
    in_scale: Tensor | None = None  # [Cin]
    in_shift: Tensor | None = None  # [Cin]
    scale: Tensor | None = None  # [Cout]
    shift: Tensor | None = None  # [Cout]
    residual: Tensor | None = None  # [N, Cout, H', W']
    residual_scale: Tensor | None = None  # [Cout]
    residual_shift: Tensor | None = None  # [Cout]
    relu: bool = False
    save_mask: bool = False
    save_stats: bool = False


class Conv1x1BackwardInput(NamedTuple):
    """BN backward, then the input gradient of a 1x1 stride-1 convolution, then the shortcut's gradient.

    `dc = A*dz + B*c + K`, rounded, dz from dy and the sign of `scale*c + shift` if `relu`;
    `dx = dc W`, plus shortcut_dy, taken through shortcut_mask if that is given.

    Returns (dx [N, Cin, H, W], dc [N, Cout, H, W]): dc is the side output that the library's weight gradient reads.
    """

    dy: Tensor  # [N, Cout, H, W]
    c: Tensor  # [N, Cout, H, W]
    vectors: BatchNormVectors
    grads: BatchNormGrads
    weight: Tensor  # [Cout, Cin, 1, 1]
    relu: bool = True
    shortcut_dy: Tensor | None = None  # [N, Cin, H, W]
    shortcut_mask: Tensor | None = None  # packed


class Conv3x3Forward(NamedTuple):
    """`conv` is the 3x3 convolution of a with padding 1, then the epilogue of `BnAddReluForward`.

    Prologue and epilogue as in `Conv1x1Forward`. The padding is 0 whatever the prologue makes of x: it is of a, and
    relu(in_shift) is not 0. With groups each output channel sums over those of its group, as in torch.

    Returns ConvOutput, as `Conv1x1Forward` does.
    """

    x: Tensor  # [N, Cin, H, W]
    weight: Tensor  # [Cout, Cin/groups, 3, 3]
    stride: int = 1  # or 2
    in_scale: Tensor | None = None  # [Cin]
    in_shift: Tensor | None = None  # [Cin]
    scale: Tensor | None = None  # [Cout]
    shift: Tensor | None = None  # [Cout]
    residual: Tensor | None = None  # [N, Cout, H', W']
    residual_scale: Tensor | None = None  # [Cout]
    residual_shift: Tensor | None = None  # [Cout]
    relu: bool = False
    save_mask: bool = False
    save_stats: bool = False
    groups: int = 1


class Conv3x3BackwardInput(NamedTuple):
    """BN backward, then the input gradient of a 3x3 convolution with padding 1, then the shortcut's gradient.

    With c, vectors and grads, which are given together: `dc = A*dz + B*c + K`, rounded, dz from dy and the sign of
    `scale*c + shift` if `relu`. Without them dc = dy.
    dx is the convolution's input gradient of dc, plus shortcut_dy, taken through shortcut_mask if that is given.

    Returns (dx [N, Cin, H, W], dc [N, Cout, H', W']): dc, the side output that the weight gradient reads, is None where
    it would be dy.
    """

    dy: Tensor  # [N, Cout, H', W']
    x: Tensor  # [N, Cin, H, W], of which only the form is read
    weight: Tensor  # [Cout, Cin, 3, 3]
    stride: int = 1  # or 2
    c: Tensor | None = None  # [N, Cout, H', W']
    vectors: BatchNormVectors | None = None
    grads: BatchNormGrads | None = None
    relu: bool = True
    shortcut_dy: Tensor | None = None  # [N, Cin, H, W]
    shortcut_mask: Tensor | None = None  # packed


class ConvBackwardWeight(NamedTuple):
    """The weight gradient of any `conv2d(a, W)`, summed over the positions inside a: padding is never read.

    Prologue: `a = relu(in_scale*x + in_shift)`, rounded, if in_scale is given, else a = x.

    Returns dW [Cout, Cin/groups, kh, kw], in the accumulation dtype and x's memory format.
    """

    dy: Tensor  # [N, Cout, H', W']
    x: Tensor  # [N, Cin, H, W]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    in_scale: Tensor | None = None  # [Cin]
    in_shift: Tensor | None = None  # [Cin]


class ConvBackwardInput(NamedTuple):
    """The input gradient of any `conv2d(x, weight)`, plus shortcut_dy, taken through shortcut_mask if that is given.

    Returns dx [N, Cin, H, W].
    """

    dy: Tensor  # [N, Cout, H', W']
    x: Tensor  # [N, Cin, H, W], of which only the form is read
    weight: Tensor  # [Cout, Cin/groups, kh, kw]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    shortcut_dy: Tensor | None = None  # [N, Cin, H, W]
    shortcut_mask: Tensor | None = None  # packed
    reuse_shortcut: bool = False  # the caller is done with shortcut_dy: dx may take its storage
