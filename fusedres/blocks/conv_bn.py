"""One convolution and its BN, forward and backward: the pieces that the recipes are made of.

Convolutions that no raw op covers go to torch's own, on plain tensors. Called by `separate` and `gram`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.backends.reference import ReferenceOps
from fusedres.blocks.config import ConvBNConfig, ConvBNGrads, ConvBNNeeds, ConvBNTensors
from fusedres.blocks.gram_form import is_plain_1x1
from fusedres.dispatch import Dispatcher
from fusedres.raw_ops import BatchNormGrads, BatchNormVectors, accumulation_dtype

LIBRARY = ReferenceOps.name  # torch's own convolution: both gradients in one call, where it serves


def convolve(x: Tensor, unit: ConvBNConfig, t: ConvBNTensors) -> Tensor:
    """The raw convolution output c [N, Cout, H', W'], in x's dtype."""
    bias = None if t.conv_bias is None else t.conv_bias.to(x.dtype)
    return F.conv2d(x, t.weight.to(x.dtype), bias, unit.stride, unit.padding, unit.dilation, unit.groups)


def frozen_vectors(
    ops: Dispatcher, unit: ConvBNConfig, t: ConvBNTensors, like: Tensor
) -> BatchNormVectors | None:
    """The vectors of a BN with frozen statistics, for activations of like's dtype; None if the batch's are used."""
    if unit.training:
        return None
    assert t.mean is not None and t.var is not None
    acc = accumulation_dtype(like.dtype)
    return ops.bn_scale_shift(t.mean.to(acc), t.var.to(acc), t.bn_weight, t.bn_bias, unit.eps)


def conv_bn_forward(
    ops: Dispatcher, x: Tensor, unit: ConvBNConfig, t: ConvBNTensors, frozen: BatchNormVectors | None
) -> tuple[Tensor, BatchNormVectors]:
    """c and the vectors of its BN: `frozen`, or those of the batch."""
    if frozen is not None:
        return convolve(x, unit, t), frozen
    c, mean, var = convolve_with_stats(ops, x, unit, t)
    return c, ops.bn_scale_shift(mean, var, t.bn_weight, t.bn_bias, unit.eps)


def convolve_with_stats(
    ops: Dispatcher, x: Tensor, unit: ConvBNConfig, t: ConvBNTensors
) -> tuple[Tensor, Tensor, Tensor]:
    """c, and mean and var of the batch: in one product where a backend has that, else by a pass over c."""
    product = "conv1x1_forward", x, cast_later(t, x)
    if is_plain_1x1(unit, t) and ops.serving(*product, save_stats=True) != LIBRARY:
        bias = None if t.conv_bias is None else t.conv_bias.to(x.dtype)
        out = ops.conv1x1_forward(x, t.weight.to(x.dtype), bias, save_stats=True)
        return out.y, out.mean, out.var
    c = convolve(x, unit, t)
    return c, *ops.bn_stats(c)


def conv_bn_add_relu(
    ops: Dispatcher,
    x: Tensor,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    vectors: BatchNormVectors,
    relu: bool,
    shortcut: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Tensor | None:
    """relu(BN(conv(x)) + shortcut) in one product, for a 1x1 convolution whose vectors are known, on a CPU; else None.

    shortcut: a tensor, and scale and shift of its BN or None.
    """
    if not is_plain_1x1(unit, t) or not x.is_cpu:
        return None
    args = t.conv_bias, 1, None, None, vectors.scale, vectors.shift, *shortcut, relu
    if ops.serving("conv1x1_forward", x, cast_later(t, x), *args) == LIBRARY:
        return None
    return ops.conv1x1_forward(x, t.weight.to(x.dtype), *args).y


def cast_later(t: ConvBNTensors, x: Tensor) -> Tensor:
    """What the convolution's weight will be in x's dtype, to ask which backend would take it: its values are not."""
    return t.weight if t.weight.dtype == x.dtype else x.new_empty(t.weight.shape)


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


def takes_masked_gradient(
    ops: Dispatcher,
    dc: Tensor,
    x: Tensor,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    dy: Tensor,
    mask: Tensor | None,
) -> bool:
    """Whether the input gradient of `convolve` takes dy through a mask as it adds it: then nobody need store dz."""
    if mask is None:
        return False
    window = unit.stride, unit.padding, unit.dilation, unit.groups
    return ops.serving("conv_backward_input", dc, x, cast_later(t, x), *window, dy, mask) != LIBRARY


def convolution_backward(
    ops: Dispatcher,
    dc: Tensor,
    x: Tensor,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    needs: ConvBNNeeds,
    need_dx: bool,
    onto: Tensor | None = None,
    onto_mask: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias of `convolve` from dc [N, Cout, H', W'], None where not wanted.

    onto: another gradient of x, which dx is added to: in its storage, or, with a mask, what the mask keeps of it.
    """
    dx = dweight = dbias = None
    window = unit.stride, unit.padding, unit.dilation, unit.groups
    weight = t.weight.to(x.dtype)
    for_weight = dc, x, (weight.shape[2], weight.shape[3]), *window
    for_input = dc, x, weight, *window, onto, onto_mask
    library_weight = needs.weight and ops.serving("conv_backward_weight", *for_weight) == LIBRARY
    library_input = need_dx and onto is None and ops.serving("conv_backward_input", *for_input) == LIBRARY
    if library_weight or library_input:  # both in one call
        args = unit.stride, unit.padding, unit.dilation, False, [0, 0], unit.groups
        wanted = [library_input, library_weight, False]
        dx, dweight, _ = torch.ops.aten.convolution_backward(dc, x, weight, None, *args, wanted)
    if needs.weight and not library_weight:
        dweight = ops.conv_backward_weight(*for_weight)
    if need_dx and not library_input:
        dx = ops.conv_backward_input(*for_input, reuse_shortcut=True)
    if needs.conv_bias:
        assert t.conv_bias is not None
        dbias = like_parameter(dc.sum((0, 2, 3)), t.conv_bias)
    return dx, None if dweight is None else like_parameter(dweight, t.weight), dbias


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
    onto: Tensor | None = None,
    onto_mask: Tensor | None = None,
) -> tuple[Tensor | None, ConvBNGrads]:
    """Backward of relu(BN(conv(x))) inside a block.

    Args:
        da: gradient of the activation [N, Cout, H', W'], given away; with `sums` given it is dz already.
        c: raw convolution output, like da.
        sums: `sum dz`, `sum dz*(c - mean)`, if the caller has them.
        onto, onto_mask: as for `convolution_backward`.

    Returns:
        dx [N, Cin, H, W] if need_dx, and the gradients of the parameters.
    """
    relu = unit.relu and sums is None
    if sums is None:
        sums = ops.bn_add_relu_backward_reduce(da, c, vectors, relu=relu)[:2]
    grads = ops.bn_backward_coefficients(*sums, vectors, rows(c), unit.training)
    if not (need_dx or needs.weight or needs.conv_bias):
        return None, ConvBNGrads(None, None, *bn_parameter_grads(grads, t, needs))
    dc, _ = ops.bn_add_relu_backward_input(da, c, vectors, grads, relu=relu, reuse_dy=True)
    dx, dweight, dbias = convolution_backward(ops, dc, x, unit, t, needs, need_dx, onto, onto_mask)
    return dx, ConvBNGrads(dweight, dbias, *bn_parameter_grads(grads, t, needs))
