"""One residual block as data: what is constant in a call, and the tensors of each convolution and its BN.

    y = relu(BN(conv(... relu(BN(conv(x))) ...)) + shortcut)

`BlockConfig` describes it; `main` runs from the input to the output. The shortcut is absent (a plain block), the
input itself, a projection (one convolution and its BN), or a tensor computed elsewhere. A stem is a plain block of one
convolution that ends in a max-pooling: y = maxpool(relu(BN(conv(x)))).
"""

from __future__ import annotations

from enum import Enum
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.ops.contract import BatchNormVectors


class Shortcut(Enum):
    NONE = "none"  # a plain block
    IDENTITY = "identity"  # x
    PROJECTION = "projection"  # BN(conv(x)), applied in the join: both BNs in one pass
    TENSOR = "tensor"  # any other expression of x, evaluated before the block runs


Size = tuple[int, int]  # height, width, or one number for each


def output_size(size: Size, kernel: Size, stride: Size, padding: Size, dilation: Size) -> Size:
    """H', W' of a convolution."""
    return (
        (size[0] + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1,
        (size[1] + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1,
    )


class ConvBNConfig(NamedTuple):
    """One convolution and its BN: constants of a call."""

    stride: Size
    padding: Size
    dilation: Size
    groups: int
    eps: float
    training: bool  # normalise with batch statistics; else with the given mean and var
    relu: bool  # ReLU after the BN (in the last of the main path: after the addition)


class ConvBNTensors(NamedTuple):
    """One convolution and its BN: its tensors, None where the module has none.

    weight [Cout, Cin/groups, kh, kw], conv_bias [Cout]; bn_weight, bn_bias [Cout]; mean, var [Cout]: frozen
    statistics, None when the batch's are used.
    """

    weight: Tensor
    conv_bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None


def own_statistics(t: ConvBNTensors) -> ConvBNTensors:
    """The same with copies of frozen statistics, to be kept: a later call in training mode moves the buffers."""
    if t.mean is None and t.var is None:
        return t
    mean, var = (None if s is None else s.clone() for s in (t.mean, t.var))
    return t._replace(mean=mean, var=var)


class ConvBNNeeds(NamedTuple):
    """Which parameters of one convolution and its BN want a gradient; also the gradients themselves."""

    weight: bool
    conv_bias: bool
    bn_weight: bool
    bn_bias: bool

    @property
    def any(self) -> bool:
        return any(self)


class ConvBNGrads(NamedTuple):
    """Gradients of one convolution and its BN, None where none was wanted."""

    weight: Tensor | None
    conv_bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None


class Window(NamedTuple):
    """A max-pooling's square window, without dilation, in floor mode: one number each for height and width."""

    kernel_size: int
    stride: int
    padding: int


class BlockConfig(NamedTuple):
    """One block: constants of a call. `projection` is given with Shortcut.PROJECTION only, `pool` with a main path of
    one convolution and Shortcut.NONE only."""

    main: tuple[ConvBNConfig, ...]
    shortcut: Shortcut
    projection: ConvBNConfig | None
    dtype: torch.dtype  # of activations; convolution parameters are cast to it
    pool: Window | None = None

    @property
    def units(self) -> tuple[ConvBNConfig, ...]:
        """main, then the projection."""
        return self.main if self.projection is None else (*self.main, self.projection)


def unit_sizes(config: BlockConfig, units: tuple[ConvBNTensors, ...], x: Tensor) -> list[Size]:
    """Height and width of every unit's output, as `config.units`, from x [N, Cin, H, W]."""
    _, _, height, width = x.shape
    first = size = (height, width)
    sizes: list[Size] = []
    for i, (unit, t) in enumerate(zip(config.units, units, strict=True)):
        _, _, *kernel = t.weight.shape
        start = first if i == len(config.main) else size  # the projection starts from x
        size = output_size(start, kernel, unit.stride, unit.padding, unit.dilation)  # type: ignore[arg-type]
        sizes.append(size)
    return sizes


class BlockNeeds(NamedTuple):
    """What backward owes: which inputs of the block want a gradient, `units` as in `BlockConfig.units`.

    saved: whether the tensors that forward saved must stay as they are, for another backward or another holder.
    """

    x: bool
    residual: bool
    units: tuple[ConvBNNeeds, ...]
    saved: bool = True

    def below(self, index: int) -> bool:
        """Whether anything before main[index] wants a gradient: must one flow out of its convolution?"""
        return self.x or any(unit.any for unit in self.units[:index])


Layout = tuple[int, int, int]


class Saved(NamedTuple):
    """What forward keeps for backward, besides the inputs.

    activations: inputs of main[1:] (recipes separate, and prologue, where one was stored); convs: raw convolution
    outputs, as `units` (recipe gram has none for the last of main); vectors: as `units`; mask: packed, of the ReLU of
    y, or of a block that ends in a pool the pool's indices; moments: m, S and center (recipe gram, batch statistics);
    weights: as `units`, those that were cast, or none at all.
    """

    activations: tuple[Tensor | None, ...]
    convs: tuple[Tensor | None, ...]
    vectors: tuple[BatchNormVectors, ...]
    mask: Tensor | None
    moments: tuple[Tensor, Tensor, Tensor] | None
    weights: tuple[Tensor | None, ...] = ()

    def flatten(self) -> tuple[Tensor | None, ...]:
        """All of it in one tuple, for save_for_backward."""
        vectors = tuple(v for vectors in self.vectors for v in vectors)
        return (*self.activations, *self.convs, *vectors, *self.weights, self.mask, *(self.moments or ()))

    @property
    def layout(self) -> Layout:
        """Numbers of activations, of units and of weights: what `unflatten` needs."""
        return len(self.activations), len(self.convs), len(self.weights)

    @staticmethod
    def unflatten(tensors: tuple[Tensor | None, ...], layout: Layout) -> Saved:
        activations, units, kept = layout
        fields = len(BatchNormVectors._fields)
        starts = [0, *accumulate((activations, units, units * fields, kept))]
        vectors, weights = tensors[starts[2] : starts[3]], tensors[starts[3] : starts[4]]
        mask, *moments = tensors[starts[4] :]
        return Saved(
            tensors[: starts[1]],
            tensors[starts[1] : starts[2]],
            tuple(BatchNormVectors(*vectors[i * fields : (i + 1) * fields]) for i in range(units)),  # type: ignore[arg-type]
            mask,
            tuple(moments) if moments else None,  # type: ignore[arg-type]
            weights,
        )


class BlockOutput(NamedTuple):
    """Result of a recipe's forward; saved is None if no gradient was asked for."""

    y: Tensor
    vectors: tuple[BatchNormVectors, ...]  # as `units`: mean and var feed the running statistics
    saved: Saved | None


class BlockGrads(NamedTuple):
    """Result of a recipe's backward; `units` as in `BlockConfig.units`."""

    x: Tensor | None
    residual: Tensor | None
    units: tuple[ConvBNGrads, ...]
