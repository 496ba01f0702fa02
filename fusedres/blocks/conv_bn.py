"""One convolution and its BN, forward and backward: the pieces that the recipes are made of.

Convolutions that no raw op covers go to torch's own, on plain tensors. Called by `separate` and `gram`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.blocks.config import ConvBNConfig, ConvBNGrads, ConvBNNeeds, ConvBNTensors
from fusedres.blocks.gram_form import is_plain_1x1
from fusedres.blocks.statistics import grads_of_batch, vectors_of_batch
from fusedres.ops.backend import Backend
from fusedres.ops.contract import (
    BatchNormGrads,
    BatchNormVectors,
    BnAddReluBackwardInput,
    BnAddReluBackwardReduce,
    BnStats,
    Conv1x1Forward,
    Conv3x3Forward,
    ConvBackwardInput,
    ConvBackwardWeight,
)
from fusedres.ops.dispatch import Dispatcher


class Onto(NamedTuple):
    """Another gradient of a convolution's input, which that of the convolution is added to.

    mask: packed, of what is kept of `gradient`; then `backend` is one that takes it as it adds. Without a mask the
    sum may take the storage of `gradient`.
    """

    gradient: Tensor  # like x
    mask: Tensor | None = None
    backend: Backend | None = None


def convolve(x: Tensor, unit: ConvBNConfig, t: ConvBNTensors) -> Tensor:
    """The raw convolution output c [N, Cout, H', W'], in x's dtype."""
    bias = None if t.conv_bias is None else t.conv_bias.to(x.dtype)
    return F.conv2d(x, t.weight.to(x.dtype), bias, unit.stride, unit.padding, unit.dilation, unit.groups)


def fused_convolution(
    x: Tensor, unit: ConvBNConfig, t: ConvBNTensors
) -> Conv1x1Forward | Conv3x3Forward | None:
    """The raw op of this convolution, to which more can be fused; None: there is none of its form."""
    bias = None if t.conv_bias is None else t.conv_bias.to(x.dtype)
    if is_plain_1x1(unit, t):
        return Conv1x1Forward(x, cast_later(t, x), bias)
    if bias is None and is_plain_3x3(unit, t):
        return Conv3x3Forward(x, cast_later(t, x), unit.stride[0])
    return None


def is_plain_3x3(unit: ConvBNConfig, t: ConvBNTensors) -> bool:
    """A 3x3 convolution with padding 1, stride 1 or 2, without dilation or groups."""
    square = t.weight.shape[2:] == (3, 3) and unit.padding == (1, 1) and unit.stride in ((1, 1), (2, 2))
    return square and unit.dilation == (1, 1) and unit.groups == 1


def conv_bn_forward(
    ops: Dispatcher, x: Tensor, unit: ConvBNConfig, t: ConvBNTensors, frozen: BatchNormVectors | None
) -> tuple[Tensor, BatchNormVectors]:
    """c and the vectors of its BN: `frozen`, or those of the batch."""
    c, mean, var = convolve_fused(ops, x, unit, t, frozen is None)
    if frozen is not None:
        return c, frozen
    if mean is None or var is None:
        mean, var = ops(BnStats(c))
    return c, vectors_of_batch(ops, unit, t, mean, var)


def convolve_fused(
    ops: Dispatcher, x: Tensor, unit: ConvBNConfig, t: ConvBNTensors, stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """c by a backend that has this convolution, else by torch's own; its mean and var where those come with it."""
    op = fused_convolution(x, unit, t)
    if op is not None and (stats or isinstance(op, Conv3x3Forward)):
        backend = ops.serving(op._replace(save_stats=stats))
        if not backend.is_plain:
            out = backend(with_weight(op._replace(save_stats=stats), t))
            return out.y, out.mean, out.var
    return convolve(x, unit, t), None, None


def conv_bn_add_relu(
    ops: Dispatcher,
    x: Tensor,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    vectors: BatchNormVectors,
    relu: bool,
    shortcut: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Tensor | None:
    """relu(BN(conv(x)) + shortcut) at once, where a backend has that for the convolution, on a CPU; else None.

    shortcut: a tensor, and scale and shift of its BN or None.
    """
    op = fused_convolution(x, unit, t) if x.is_cpu else None
    if op is None:
        return None
    residual, residual_scale, residual_shift = shortcut
    op = op._replace(
        scale=vectors.scale,
        shift=vectors.shift,
        residual=residual,
        residual_scale=residual_scale,
        residual_shift=residual_shift,
        relu=relu,
    )
    backend = ops.serving(op)
    if backend.is_plain:
        return None
    return backend(with_weight(op, t)).y


def cast_later(t: ConvBNTensors, x: Tensor) -> Tensor:
    """A tensor of the form that the convolution's weight has once cast to x's dtype, to ask which backend takes it."""
    return t.weight if t.weight.dtype == x.dtype else torch.empty_like(t.weight, dtype=x.dtype)


def with_weight(op: Conv1x1Forward | Conv3x3Forward, t: ConvBNTensors) -> Conv1x1Forward | Conv3x3Forward:
    """The same call with the weight itself in the place of what stood for it."""
    return op if op.weight is t.weight else op._replace(weight=t.weight.to(op.x.dtype))


def like_parameter(grad: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in its parameter's dtype and strides."""
    if grad.dtype == parameter.dtype and grad.stride() == parameter.stride():
        return grad
    if grad.dtype == parameter.dtype and grad.is_contiguous() and parameter.is_contiguous():
        return grad.as_strided(parameter.shape, parameter.stride())  # they differ in dimensions of size 1
    return torch.empty_like(parameter).copy_(grad.view(parameter.shape))


def bn_parameter_grads(
    grads: BatchNormGrads, t: ConvBNTensors, needs: ConvBNNeeds, shared: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """dweight and dbias of the BN, where wanted, in storage of their own. shared: another BN is given the same sum."""
    dweight = like_parameter(grads.dweight, t.bn_weight) if needs.bn_weight else None  # type: ignore[arg-type]
    if not needs.bn_bias:
        return dweight, None
    dbias = grads.dbias.clone() if shared else grads.dbias
    return dweight, like_parameter(dbias, t.bn_bias)  # type: ignore[arg-type]


def onto_masked(
    ops: Dispatcher,
    dc: Tensor,
    x: Tensor,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    dy: Tensor,
    mask: Tensor | None,
) -> Onto | None:
    """dy through a mask, if the input gradient of `convolve` takes it so as it adds it: then nobody need store dz.

    dc: of the form that the gradient of the convolution's output will have.
    """
    if mask is None:
        return None
    window = unit.stride, unit.padding, unit.dilation, unit.groups
    backend = ops.serving(ConvBackwardInput(dc, x, cast_later(t, x), *window, dy, mask))
    return None if backend.is_plain else Onto(dy, mask, backend)


def convolution_backward(
    ops: Dispatcher,
    dc: Tensor,
    x: Tensor,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    needs: ConvBNNeeds,
    need_dx: bool,
    onto: Onto | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias of `convolve` from dc [N, Cout, H', W'], None where not wanted. dx is added to `onto`.

    Where torch's own convolution serves, both gradients come from one call of it.
    """
    dx = dweight = dbias = None
    window = unit.stride, unit.padding, unit.dilation, unit.groups
    weight = t.weight.to(x.dtype)
    library_weight = library_input = False
    if needs.weight:
        weight_op = ConvBackwardWeight(dc, x, (weight.shape[2], weight.shape[3]), *window)
        backend = ops.serving(weight_op)
        library_weight = backend.is_plain
        dweight = None if library_weight else backend(weight_op)
    gradient, mask, backend_onto = onto or (None, None, None)
    if need_dx:
        input_op = ConvBackwardInput(dc, x, weight, *window, gradient, mask, True)
        backend = backend_onto or ops.serving(input_op)
        library_input = mask is None and backend.is_plain
        dx = None if library_input else backend(input_op)
    if library_weight or library_input:
        args = unit.stride, unit.padding, unit.dilation, False, [0, 0], unit.groups
        wanted = [library_input, library_weight, False]
        by_library = torch.ops.aten.convolution_backward(dc, x, weight, None, *args, wanted)
        dx, dweight = by_library[0] if library_input else dx, by_library[1] if library_weight else dweight
    if library_input and gradient is not None:
        assert dx is not None
        dx = gradient.add_(dx)
    if needs.conv_bias:
        assert t.conv_bias is not None
        dbias = like_parameter(dc.sum((0, 2, 3)), t.conv_bias)
    return dx, dweight, dbias


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
    onto: Onto | None = None,
) -> tuple[Tensor | None, ConvBNGrads]:
    """Backward of relu(BN(conv(x))) inside a block.

    Args:
        da: gradient of the activation [N, Cout, H', W'], given away; with `sums` given it is dz already.
        c: raw convolution output, like da.
        sums: `sum dz`, `sum dz*(c - mean)`, if the caller has them.
        onto: as for `convolution_backward`.

    Returns:
        dx [N, Cin, H, W] if need_dx, and the gradients of the parameters.
    """
    relu = unit.relu and sums is None
    if sums is None:
        sums = ops(BnAddReluBackwardReduce(da, c, vectors, relu=relu))[:2]
    grads = grads_of_batch(ops, unit, vectors, c, *sums)
    if not (need_dx or needs.weight or needs.conv_bias):
        return None, ConvBNGrads(None, None, *bn_parameter_grads(grads, t, needs))
    dc, _ = ops(BnAddReluBackwardInput(da, c, vectors, grads, relu=relu, reuse_dy=True))
    dx, dweight, dbias = convolution_backward(ops, dc, x, unit, t, needs, need_dx, onto)
    return dx, ConvBNGrads(dweight, dbias, *bn_parameter_grads(grads, t, needs))
