"""One convolution and its BN, forward and backward: the pieces that the recipes are made of.

Convolutions that no raw op covers go to torch's own, on plain tensors. Called by `separate` and `gram`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.backends.reference import ReferenceOps
from fusedres.blocks.config import ConvBNConfig, ConvBNGrads, ConvBNNeeds, ConvBNTensors
from fusedres.dispatch import Dispatcher
from fusedres.raw_ops import BatchNormGrads, BatchNormVectors, accumulation_dtype

LIBRARY = ReferenceOps.name  # torch's own convolution: both gradients in one call, where it serves


def convolve(x: Tensor, unit: ConvBNConfig, t: ConvBNTensors) -> Tensor:
    """The raw convolution output c [N, Cout, H', W'], in x's dtype."""
    bias = None if t.conv_bias is None else t.conv_bias.to(x.dtype)
    return F.conv2d(x, t.weight.to(x.dtype), bias, unit.stride, unit.padding, unit.dilation, unit.groups)


def frozen_vectors(
    ops: Dispatcher, unit: ConvBNConfig, t: ConvBNTensors, like: Tensor, save: bool
) -> BatchNormVectors | None:
    """The vectors of a BN with frozen statistics, for activations of like's dtype; None if the batch's are used.

    save: whether they are kept for backward. Otherwise mean and var may be the buffers themselves.
    """
    if unit.training:
        return None
    assert t.mean is not None and t.var is not None
    acc = accumulation_dtype(like.dtype)
    # kept ones are copies: an operator of a compiled graph must not return what it was given
    mean, var = t.mean.to(acc, copy=save), t.var.to(acc, copy=save)
    return ops.bn_scale_shift(mean, var, t.bn_weight, t.bn_bias, unit.eps)


def conv_bn_forward(
    ops: Dispatcher, x: Tensor, unit: ConvBNConfig, t: ConvBNTensors, frozen: BatchNormVectors | None
) -> tuple[Tensor, BatchNormVectors]:
    """c and the vectors of its BN: `frozen`, or those of the batch."""
    c = convolve(x, unit, t)
    return c, frozen or ops.bn_scale_shift(*ops.bn_stats(c), t.bn_weight, t.bn_bias, unit.eps)


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


def is_pointwise(unit: ConvBNConfig, t: ConvBNTensors) -> bool:
    """A 1x1 convolution without padding or groups: a matrix product on the positions that its stride keeps."""
    return t.weight.shape[2:] == (1, 1) and unit.groups == 1 and unit.padding == (0, 0)


def add_input_gradient(dx: Tensor, dc: Tensor, x: Tensor, unit: ConvBNConfig, t: ConvBNTensors) -> Tensor:
    """`dx` [N, Cin, H, W] plus the input gradient of `convolve` from dc [N, Cout, H', W'], in dx's storage.

    On a CPU a 1x1 convolution's is a product added in place: where eager stores it, zeros between the stride's
    positions included, and adds it in a pass of its own.
    """
    product = is_pointwise(unit, t) and dx.device.type == "cpu" and dx.dtype in (torch.float32, torch.float64)
    if not product or not all(v.is_contiguous(memory_format=torch.channels_last) for v in (dx, dc)):
        added, _ = library_gradients(dc, x, unit, t, (True, False))
        assert added is not None
        return dx.add_(added)
    weight = t.weight.to(dx.dtype).flatten(1)  # [Cout, Cin]
    kept = dx[:, :, :: unit.stride[0], :: unit.stride[1]]
    columns = dc.permute(0, 2, 3, 1).flatten(0, 2)  # [P', Cout]
    if unit.stride == (1, 1):
        dx.permute(0, 2, 3, 1).view(-1, dx.shape[1]).addmm_(columns, weight)
    else:
        kept.permute(0, 2, 3, 1).add_((columns @ weight).view(*kept.permute(0, 2, 3, 1).shape))
    return dx


def library_gradients(
    dc: Tensor, x: Tensor, unit: ConvBNConfig, t: ConvBNTensors, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dweight of `convolve`, as far as wanted, from dc [N, Cout, H', W'], by torch's own convolution."""
    window = unit.stride, unit.padding, unit.dilation, False, [0, 0], unit.groups
    weight = t.weight.to(x.dtype)
    gradients = torch.ops.aten.convolution_backward(dc, x, weight, None, *window, [*wanted, False])
    return tuple(g if wants else None for g, wants in zip(gradients, wanted, strict=False))  # type: ignore[return-value]


def convolution_backward(
    ops: Dispatcher,
    dc: Tensor,
    x: Tensor,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    needs: ConvBNNeeds,
    need_dx: bool,
    onto: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias of `convolve` from dc [N, Cout, H', W'], None where not wanted.

    onto: another gradient of x, which dx is added to, in its storage.
    """
    dx = dweight = dbias = None
    window = unit.stride, unit.padding, unit.dilation, unit.groups
    args = dc, x, (t.weight.shape[2], t.weight.shape[3]), *window
    if ops.serving("conv_backward_weight", *args) == LIBRARY:
        wanted = need_dx and onto is None, needs.weight
        dx, dweight = library_gradients(dc, x, unit, t, wanted) if any(wanted) else (None, None)
    elif needs.weight:
        dweight = ops.conv_backward_weight(*args)
    if need_dx and onto is not None:
        dx = add_input_gradient(onto, dc, x, unit, t)
    elif need_dx and dx is None:
        dx, _ = library_gradients(dc, x, unit, t, (True, False))
    if dweight is not None:
        dweight = like_parameter(dweight, t.weight)
    if needs.conv_bias:
        assert t.conv_bias is not None
        dbias = like_parameter(dc.sum((0, 2, 3)), t.conv_bias)
    return dx, dweight, dbias


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
        sums = ops.bn_add_relu_backward_reduce(da, c, vectors, relu=relu)[:2]
    grads = ops.bn_backward_coefficients(*sums, vectors, rows(c), unit.training)
    if not (need_dx or needs.weight or needs.conv_bias):
        return None, ConvBNGrads(None, None, *bn_parameter_grads(grads, t, needs))
    dc, _ = ops.bn_add_relu_backward_input(da, c, vectors, grads, relu=relu, reuse_dy=True)
    dx, dweight, dbias = convolution_backward(ops, dc, x, unit, t, needs, need_dx, onto)
    return dx, ConvBNGrads(dweight, dbias, *bn_parameter_grads(grads, t, needs))
