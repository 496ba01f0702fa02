"""Checks of 3x3 convolutions with groups on a CPU: against float64 and eager, by the one rule of accuracy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager
from torch import Tensor

from fusedres.ops.contract import Conv3x3Forward, ConvBackwardInput, ConvBackwardWeight
from fusedres.ops.native import functions

SIDES = [(1, 1), (1, 9), (2, 3), (7, 7), (6, 14), (9, 16), (15, 11)]
GROUPS = [(32, 4), (64, 8), (32, 16), (64, 32)]  # channels, channels of a group
STRIDES = [1, 2]


def dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def operands(
    height: int, width: int, channels: int, in_group: int, stride: int, batch: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """x, the weight, and a gradient of the convolution's output."""
    torch.manual_seed(0)
    x, weight = torch.randn(batch, channels, height, width) + 0.3, torch.randn(channels, in_group, 3, 3)
    x, weight = dense(x), dense(weight / (3 * in_group**0.5))
    y = convolved(x, weight, stride)
    return x, weight, dense(torch.randn_like(y))


def convolved(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return F.conv2d(x, weight, None, stride, 1, groups=weight.shape[0] // weight.shape[1])


def gradients(dy: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Torch's own, of x and of the weight."""
    window = [stride] * 2, [1, 1], [1, 1], False, [0, 0], weight.shape[0] // weight.shape[1]
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *window, [True, True, False])[:2]


def served(op: Any) -> Any:
    """By the native backend, or the test's own fault."""
    backend = functions.backend()
    assert backend.reason(op) is None
    return backend(op)


def check_forward(height: int, width: int, channels: int, in_group: int, stride: int) -> None:
    x, weight, _ = operands(height, width, channels, in_group, stride)
    exact, eager = convolved(x.double(), weight.double(), stride), convolved(x, weight, stride)
    op = Conv3x3Forward(x, weight, stride, groups=channels // in_group)
    assert_as_accurate_as_eager(served(op).y, eager, exact, "y")
    out = served(op._replace(save_stats=True))
    assert torch.equal(out.y, served(op).y)
    exact_moments = torch.var_mean(out.y.double(), (0, 2, 3), correction=0)
    eager_moments = torch.var_mean(out.y, (0, 2, 3), correction=0)
    for name, found, *known in zip(
        ("var", "mean"), (out.var, out.mean), eager_moments, exact_moments, strict=True
    ):
        assert_as_accurate_as_eager(found, *known, name)
    scale, shift = torch.randn(channels), torch.randn(channels)
    rows = scale.view(-1, 1, 1), shift.view(-1, 1, 1)
    for relu in (False, True):
        found = served(op._replace(scale=scale, shift=shift, relu=relu)).y
        of_eager, of_exact = eager * rows[0] + rows[1], exact * rows[0].double() + rows[1].double()
        if relu:
            of_eager, of_exact = of_eager.relu(), of_exact.relu()
        assert_as_accurate_as_eager(found, of_eager, of_exact, "y behind BN")


def check_gradients(height: int, width: int, channels: int, in_group: int, stride: int) -> None:
    x, weight, dy = operands(height, width, channels, in_group, stride)
    window = (stride, stride), (1, 1), (1, 1), channels // in_group
    exact = gradients(dy.double(), x.double(), weight.double(), stride)
    eager = gradients(dy, x, weight, stride)
    dw = served(ConvBackwardWeight(dy, x, (3, 3), *window))
    assert dw.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate_as_eager(dw, eager[1], exact[1], "dweight")
    if stride == 1:
        assert_as_accurate_as_eager(
            served(ConvBackwardInput(dy, x, weight, *window)), eager[0], exact[0], "dx"
        )
