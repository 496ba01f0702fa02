"""One convolution and its BN, forward and backward: the pieces that the recipes are made of.

Convolutions that no raw op covers go to torch's own, on plain tensors. Called by `separate` and `gram`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.blocks.config import ConvBNConfig, ConvBNGrads, ConvBNNeeds, ConvBNTensors
from fusedres.dispatch import Dispatcher
from fusedres.raw_ops import BatchNormGrads, BatchNormVectors, accumulation_dtype


def convolve(x: Tensor, unit: ConvBNConfig, t: ConvBNTensors) -> Tensor:
    """The raw convolution output c [N, Cout, H', W'], in x's dtype."""
    bias = None if t.conv_bias is None else t.conv_bias.to(x.dtype)
    return F.conv2d(x, t.weight.to(x.dtype), bias, unit.stride, unit.padding, unit.dilation, unit.groups)


def normalization(
    ops: Dispatcher, unit: ConvBNConfig, t: ConvBNTensors, stats: tuple[Tensor, Tensor] | None, like: Tensor
) -> BatchNormVectors:
    """The BN's vectors, from the batch's mean and var if `unit.training`, else from the frozen ones of `t`."""
    if not unit.training:
        assert t.mean is not None and t.var is not None
        acc = accumulation_dtype(like.dtype)
        # copies: the buffers may change in place before backward
        stats = t.mean.to(acc, copy=True), t.var.to(acc, copy=True)
    assert stats is not None
    return ops.bn_scale_shift(*stats, t.bn_weight, t.bn_bias, unit.eps)


def conv_bn_forward(
    ops: Dispatcher, x: Tensor, unit: ConvBNConfig, t: ConvBNTensors
) -> tuple[Tensor, BatchNormVectors]:
    """c and the vectors of its BN."""
    c = convolve(x, unit, t)
    return c, normalization(ops, unit, t, ops.bn_stats(c) if unit.training else None, c)


def like_parameter(grad: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in its parameter's dtype and strides."""
    if grad.dtype == parameter.dtype and grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter).copy_(grad.view(parameter.shape))


def bn_parameter_grads(
    grads: BatchNormGrads, t: ConvBNTensors, needs: ConvBNNeeds
) -> tuple[Tensor | None, Tensor | None]:
    """dweight and dbias of the BN, where wanted; fresh storage each (one sum may serve two BNs)."""
    dweight = torch.empty_like(t.bn_weight).copy_(grads.dweight) if needs.bn_weight else None  # type: ignore[arg-type]
    dbias = torch.empty_like(t.bn_bias).copy_(grads.dbias) if needs.bn_bias else None  # type: ignore[arg-type]
    return dweight, dbias


def convolution_backward(
    dc: Tensor, x: Tensor, unit: ConvBNConfig, t: ConvBNTensors, needs: ConvBNNeeds, need_dx: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias of `convolve` from dc [N, Cout, H', W'], None where not wanted."""
    wanted = [need_dx, needs.weight, needs.conv_bias]
    if not any(wanted):
        return None, None, None
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dc,
        x,
        t.weight.to(x.dtype),
        [t.weight.shape[0]],
        unit.stride,
        unit.padding,
        unit.dilation,
        False,
        [0, 0],
        unit.groups,
        wanted,
    )
    return (
        dx if need_dx else None,
        like_parameter(dweight, t.weight) if needs.weight else None,
        like_parameter(dbias, t.conv_bias) if needs.conv_bias else None,  # type: ignore[arg-type]
    )


def rows(c: Tensor) -> int:
    """P, the positions one channel has."""
    return c.shape[0] * c.shape[2] * c.shape[3]


def conv_bn_backward(
    ops: Dispatcher,
    da: Tensor,
    x: Tensor,
    c: Tensor,
    vectors: BatchNormVectors,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    needs: ConvBNNeeds,
    need_dx: bool,
    sums: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ConvBNGrads]:
    """Backward of relu(BN(conv(x))) inside a block.

    Args:
        da: gradient of the activation [N, Cout, H', W']; with `sums` given it is dz already.
        c: raw convolution output, like da.
        sums: `sum dz`, `sum dz*(c - mean)`, if the caller has them.

    Returns:
        dx [N, Cin, H, W] if need_dx, and the gradients of the parameters.
    """
    relu = unit.relu and sums is None
    if sums is None:
        sums = ops.bn_add_relu_backward_reduce(da, c, vectors, relu=relu)[:2]
    grads = ops.bn_backward_coefficients(*sums, vectors, rows(c), unit.training)
    if not (need_dx or needs.weight or needs.conv_bias):
        return None, ConvBNGrads(None, None, *bn_parameter_grads(grads, t, needs))
    dc, _ = ops.bn_add_relu_backward_input(da, c, vectors, grads, relu=relu)
    dx, dweight, dbias = convolution_backward(dc, x, unit, t, needs, need_dx)
    return dx, ConvBNGrads(dweight, dbias, *bn_parameter_grads(grads, t, needs))
