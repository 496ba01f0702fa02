"""The stem of a ResNet, `maxpool(relu(BN(conv(x))))`, forward and backward as a chain of raw ops.

BN, ReLU and pooling are one pass over the raw convolution output c, the largest tensor of the network. Keeps, besides
x: c and one byte per pooled element, where eager keeps c, the activation and eight bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fusedres.blocks.config import ConvBNConfig, ConvBNGrads, ConvBNNeeds, ConvBNTensors
from fusedres.blocks.conv_bn import bn_parameter_grads, conv_bn_forward, convolution_backward
from fusedres.blocks.eager import conv_bn
from fusedres.blocks.statistics import frozen_vectors, grads_of_batch
from fusedres.ops.contract import (
    BatchNormVectors,
    BnReluMaxpoolBackwardInput,
    BnReluMaxpoolBackwardReduce,
    BnReluMaxpoolForward,
)
from fusedres.ops.dispatch import Dispatcher


class StemConfig(NamedTuple):
    """The stem: constants of a call. The pooling window is square, without dilation, in floor mode."""

    unit: ConvBNConfig
    kernel_size: int
    pool_stride: int
    pool_padding: int

    @property
    def pool(self) -> tuple[int, int, int]:
        return self.kernel_size, self.pool_stride, self.pool_padding


class StemSaved(NamedTuple):
    """What forward keeps for backward, besides the inputs: raw output, its BN's vectors, pooling indices."""

    c: Tensor
    vectors: BatchNormVectors
    indices: Tensor | None  # without gradients


def forward(
    ops: Dispatcher, config: StemConfig, x: Tensor, t: ConvBNTensors, save: bool = True
) -> tuple[Tensor, StemSaved]:
    """y [N, Cout, H'', W''] from x [N, Cin, H, W]. save: what backward needs beyond c."""
    c, v = conv_bn_forward(ops, x, config.unit, t, frozen_vectors(ops, config.unit, t, x))
    y, indices = ops(BnReluMaxpoolForward(c, v.scale, v.shift, *config.pool, save))
    return y, StemSaved(c, v, indices)


def backward(
    ops: Dispatcher,
    config: StemConfig,
    x: Tensor,
    t: ConvBNTensors,
    saved: StemSaved,
    dy: Tensor,
    needs: ConvBNNeeds,
    need_dx: bool,
) -> tuple[Tensor | None, ConvBNGrads]:
    """dx and the parameter gradients, from dy like y."""
    c, v, indices = saved
    assert indices is not None
    sums = ops(BnReluMaxpoolBackwardReduce(dy, indices, c, v, *config.pool))
    grads = grads_of_batch(ops, config.unit, v, c, *sums)
    parameters = bn_parameter_grads(grads, t, needs)
    if not (need_dx or needs.weight or needs.conv_bias):
        return None, ConvBNGrads(None, None, *parameters)
    dc = ops(BnReluMaxpoolBackwardInput(dy, indices, c, grads, *config.pool))
    dx, dweight, dbias = convolution_backward(ops, dc, x, config.unit, t, needs, need_dx)
    return dx, ConvBNGrads(dweight, dbias, *parameters)


def differentiable(config: StemConfig, x: Tensor, t: ConvBNTensors) -> Tensor:
    """The stem in torch's differentiable operations, for second derivatives."""
    return F.max_pool2d(F.relu(conv_bn(x, config.unit, t)), *config.pool)
