"""Which blocks have a Gram form: whether recipe `gram` may run a call, decided from shapes and constants alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.blocks.config import BlockConfig, ConvBNConfig, ConvBNTensors, unit_sizes
from fusedres.ops.triton_reasons import has_full_float64

# S of P values per channel has rank P - 1, so var = w S w^T cancels: rounding S costs var |w|^2 |S| / var units, where
# eager, which squares deviations, loses the root of that number. Over the channels the number is distributed as
# 1/chi^2 with P - 1 degrees of freedom, and the error of y, a root of its mean square, is finite from five degrees on.
FEWEST_ROWS = 6


def unsuitable(config: BlockConfig, units: tuple[ConvBNTensors, ...], x: Tensor) -> str | None:
    """Why this block has no Gram form on x [N, Cin, H, W], as a reason code, or None.

    It must end BN, ReLU, conv1x1 expanding twofold, and batch statistics need enough values. On a GPU the products of
    float32 are the library's, in TF32 by default: the statistics would be those of weights that it does not use. Its
    products of weights are in float64, which many GPUs have next to no arithmetic for.
    """
    if len(config.main) < 2 or not config.main[-2].relu:
        return "no_1x1_expansion"
    cout, cin, *_ = units[len(config.main) - 1].weight.shape
    expands = is_plain_1x1(config.main[-1], units[len(config.main) - 1]) and cout >= 2 * cin
    if not expands:
        return "no_1x1_expansion"
    if x.device.type == "cuda":
        if config.dtype == torch.float32:
            return "float32_product"
        if not has_full_float64(x.device):
            return "slow_float64"
    h, w = unit_sizes(config, units, x)[len(config.main) - 1]
    few = config.main[-1].training and x.shape[0] * h * w < FEWEST_ROWS
    return "few_values_per_channel" if few else None


def is_plain_1x1(unit: ConvBNConfig, t: ConvBNTensors) -> bool:
    """A 1x1 convolution without stride, padding or groups: a plain matrix product."""
    return unit.stride == (1, 1) and is_strided_1x1(unit, t)


def is_strided_1x1(unit: ConvBNConfig, t: ConvBNTensors) -> bool:
    """A 1x1 convolution without padding or groups, of one stride along both axes."""
    pointwise = t.weight.shape[2:] == (1, 1) and unit.groups == 1
    return pointwise and unit.stride[0] == unit.stride[1] and unit.padding == (0, 0)
