"""The same block in torch's differentiable operations: what second derivatives are taken through.

The recipes' saved intermediates are constants to autograd, so under `create_graph=True` the block is computed
again from its inputs, here.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fusedres.blocks.config import BlockConfig, ConvBNConfig, ConvBNTensors, Shortcut
from fusedres.blocks.conv_bn import convolve


def conv_bn(x: Tensor, unit: ConvBNConfig, t: ConvBNTensors) -> Tensor:
    c = convolve(x, unit, t)
    return F.batch_norm(c, t.mean, t.var, t.bn_weight, t.bn_bias, unit.training, 0.0, unit.eps)


def preactivation(config: BlockConfig, x: Tensor, units: tuple[ConvBNTensors, ...]) -> Tensor:
    """What enters the block's last ReLU [N, Cout, H', W'], less a residual computed elsewhere; of a stem its y.

    Differentiable in x and every parameter; running statistics are left alone.
    """
    last = len(config.main) - 1
    a = x
    for i, (unit, t) in enumerate(zip(config.main, units, strict=False)):
        a = conv_bn(a, unit, t)
        if i < last and unit.relu:
            a = F.relu(a)
    if config.pool is not None:
        return F.max_pool2d(F.relu(a), *config.pool)
    if config.projection is not None:
        return a + conv_bn(x, config.projection, units[-1])
    return a + x if config.shortcut is Shortcut.IDENTITY else a
