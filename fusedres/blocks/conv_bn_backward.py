"""One convolution and its BN, backward: a piece that the recipes are made of; forward is `conv_bn.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.blocks.config import ConvBNConfig, ConvBNGrads, ConvBNNeeds, ConvBNTensors
from fusedres.blocks.conv_bn import Unstored, cast_later
from fusedres.blocks.prologue_form import is_plain_3x3
from fusedres.blocks.statistics import grads_of_batch
from fusedres.ops.backend import Backend
from fusedres.ops.contract import (
    BatchNormGrads,
    BatchNormVectors,
    BnAddReluBackwardInput,
    BnAddReluBackwardReduce,
    Conv3x3BackwardInput,
    ConvBackwardInput,
    ConvBackwardWeight,
)
from fusedres.ops.dispatch import Dispatcher


class Onto(NamedTuple):
    """Another gradient of a convolution's input, which that of the convolution is added to.

    mask: packed, of what is kept of `gradient`; then `backend` is one that takes it as it adds, with `bn` in the op
    that is BN's backward too. Without a mask the sum may take the storage of `gradient`.
    """

    gradient: Tensor  # like x
    mask: Tensor | None = None
    backend: Backend | None = None
    bn: bool = False


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


def bn_conv3x3_backward(
    da: Tensor,
    x: Tensor,
    c: Tensor,
    vectors: BatchNormVectors,
    grads: BatchNormGrads,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    relu: bool,
    onto: Onto | None,
) -> Conv3x3BackwardInput | None:
    """The raw op of BN's backward and this convolution's input gradient at once; None: there is none of its form.

    da, c: [N, Cout, H', W']; x [N, Cin, H, W], of which only the form is read.
    """
    if not is_plain_3x3(unit, t):
        return None
    gradient, mask, *_ = onto or (None, None)
    weight = cast_later(t, x)
    return Conv3x3BackwardInput(da, x, weight, unit.stride[0], c, vectors, grads, relu, gradient, mask)


def onto_masked(
    ops: Dispatcher,
    c: Tensor,
    vectors: BatchNormVectors,
    x: Tensor,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    onto: Onto,
    with_bn: bool,
) -> Onto | None:
    """`onto`, a gradient with a mask, if the input gradient of `convolve` takes it so as it adds it: then nobody need
    store dz.

    c, vectors: the convolution's output and its BN's vectors, of whose form their gradients will be.
    with_bn: as for `conv_bn_backward`.
    """
    dy, mask, *_ = onto
    if mask is None:
        return None
    if with_bn:
        grads = BatchNormGrads(
            *[vectors.scale] * len(BatchNormGrads._fields)
        )  # of the form that they will have
        op = bn_conv3x3_backward(c, x, c, vectors, grads, unit, t, unit.relu, onto)
        if op is not None and not (backend := ops.serving(op)).is_plain:
            return onto._replace(backend=backend, bn=True)
    window = unit.stride, unit.padding, unit.dilation, unit.groups
    backend = ops.serving(ConvBackwardInput(c, x, cast_later(t, x), *window, dy, mask))
    return None if backend.is_plain else Onto(dy, mask, backend)


def convolution_backward(
    ops: Dispatcher,
    dc: Tensor,
    a: Tensor | Unstored,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    needs: ConvBNNeeds,
    need_dx: bool,
    onto: Onto | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias of `convolve` of a from dc [N, Cout, H', W'], None where not wanted. dx is added to `onto`.

    Where torch's own convolution serves, both gradients come from one call of it.
    """
    dx = dweight = dbias = None
    x = a.c if isinstance(a, Unstored) else a  # the input gradient reads its form alone
    window = unit.stride, unit.padding, unit.dilation, unit.groups
    weight = t.weight.to(x.dtype)
    library_weight = library_input = False
    if needs.weight:
        weight_op = ConvBackwardWeight(dc, x, (weight.shape[2], weight.shape[3]), *window)
        if isinstance(a, Unstored):
            weight_op = weight_op._replace(in_scale=a.vectors.scale, in_shift=a.vectors.shift)
        backend = ops.serving(weight_op)
        if isinstance(a, Unstored) and backend.is_plain:
            x = a.stored(ops)
            weight_op = weight_op._replace(x=x, in_scale=None, in_shift=None)
            backend = ops.serving(weight_op)
        library_weight = backend.is_plain
        dweight = None if library_weight else backend(weight_op)
    gradient, mask, backend_onto, _ = onto or (None, None, None, False)
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
    a: Tensor | Unstored,
    c: Tensor,
    vectors: BatchNormVectors,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    needs: ConvBNNeeds,
    need_dx: bool,
    sums: tuple[Tensor, Tensor] | None = None,
    onto: Onto | None = None,
    with_bn: bool = False,
) -> tuple[Tensor | None, ConvBNGrads]:
    """Backward of relu(BN(conv(a))) inside a block.

    Args:
        da: gradient of the activation [N, Cout, H', W'], given away; with `sums` given it is dz already.
        a: the convolution's input [N, Cin, H, W].
        c: raw convolution output, like da.
        sums: `sum dz`, `sum dz*(c - mean)`, if the caller has them.
        onto: as for `convolution_backward`.
        with_bn: whether the input gradient of a 3x3 convolution may be one op with BN's backward.

    Returns:
        The gradient of a if need_dx, and the gradients of the parameters.
    """
    relu = unit.relu and sums is None
    if sums is None:
        sums = ops(BnAddReluBackwardReduce(da, c, vectors, relu=relu))[:2]
    grads = grads_of_batch(ops, unit, vectors, c, *sums)
    if not (need_dx or needs.weight or needs.conv_bias):
        return None, ConvBNGrads(None, None, *bn_parameter_grads(grads, t, needs))
    parameter_grads = bn_parameter_grads(grads, t, needs)
    x = a.c if isinstance(a, Unstored) else a
    fused = (
        bn_conv3x3_backward(da, x, c, vectors, grads, unit, t, relu, onto) if need_dx and with_bn else None
    )
    if onto is not None and onto.mask is not None:
        backend = onto.backend if onto.bn else None
    else:
        backend = None if fused is None else ops.serving(fused)
    if fused is not None and backend is not None and not backend.is_plain:
        dx, dc = backend(fused._replace(weight=t.weight.to(x.dtype)))
        _, dweight, dbias = convolution_backward(ops, dc, a, unit, t, needs, False)
        return dx, ConvBNGrads(dweight, dbias, *parameter_grads)
    dc, _ = ops(BnAddReluBackwardInput(da, c, vectors, grads, relu=relu, reuse_dy=True))
    dx, dweight, dbias = convolution_backward(ops, dc, a, unit, t, needs, need_dx, onto)
    return dx, ConvBNGrads(dweight, dbias, *parameter_grads)
