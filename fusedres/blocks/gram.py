"""Recipe `gram`: the raw output of a bottleneck's last convolution never exists.

A 1x1 convolution is linear, so the statistics of its output follow from the first two moments of its input:
with c = a W^T + b, m = E[a], S = E[(a-m)(a-m)^T],

    mean = W m + b,    var = diag(W S W^T)

and the convolution applies BN, addition and ReLU as it writes y. Backward, training, with dz = where(y <= 0, 0, dy)
and Rc = dz^T (a - m):

    dbias = sum dz,  dweight = invstd*rowsum(Rc*W),  A = scale,  B = -scale*invstd*dweight/P
    dW = A[:,None]*Rc + B[:,None]*(W (P*S)),  db = 0
    da = dz (A[:,None]*W) + (a - m) (W^T (B[:,None]*W)) - (A*dbias/P) W

Keeps, besides x: the raw outputs of the other convolutions and one mask bit per element of y; activations are made
again in backward. An identity bottleneck in a chain keeps x4 c1 c2 mask = 6.25 narrow tensors in bf16.
The Cout x Cin algebra is in float64 (`gram_output_stats`, `gram_backward_coefficients`): it is small, and no TF32
setting reaches it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.blocks.config import (
    BlockConfig,
    BlockGrads,
    BlockNeeds,
    BlockOutput,
    ConvBNConfig,
    ConvBNGrads,
    ConvBNNeeds,
    ConvBNTensors,
    Saved,
    Shortcut,
)
from fusedres.blocks.conv_bn import conv_bn_forward
from fusedres.blocks.conv_bn_backward import (
    bn_parameter_grads,
    conv_bn_backward,
    convolution_backward,
    like_parameter,
)
from fusedres.blocks.gram_form import is_plain_1x1
from fusedres.blocks.statistics import frozen_vectors, grads_of_batch, rows, vectors_of_batch
from fusedres.ops.contract import (
    BatchNormVectors,
    BnAddReluBackwardInput,
    BnAddReluBackwardReduce,
    BnAddReluForward,
    Conv1x1BackwardInput,
    Conv1x1BackwardWeight,
    Conv1x1Forward,
    Conv1x1GramBackwardInput,
    Gram,
    GramBackwardCoefficients,
    GramOutputStats,
    ReluBackward,
)
from fusedres.ops.dispatch import Dispatcher

KEEPS_ACTIVATIONS = False
MAKES_ACTIVATIONS = True


def product_parameters(t: ConvBNTensors, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The convolution's weight and bias, rounded to the activations' dtype."""
    return t.weight.to(dtype), None if t.conv_bias is None else t.conv_bias.to(dtype)


def forward(
    ops: Dispatcher,
    config: BlockConfig,
    x: Tensor,
    residual: Tensor | None,
    units: tuple[ConvBNTensors, ...],
    save: bool,
) -> BlockOutput:
    """y [N, Cout, H', W'] from x [N, Cin, H, W]; residual like y with Shortcut.TENSOR, else None."""
    last = len(config.main) - 1
    convs, vectors = [], []
    a = x
    for i in range(last):
        c, v = conv_bn_forward(
            ops, a, config.main[i], units[i], frozen_vectors(ops, config.main[i], units[i], x)
        )
        convs.append(c)
        vectors.append(v)
        if i < last - 1:
            a, _ = ops(BnAddReluForward(c, v.scale, v.shift, relu=config.main[i].relu))
    unit, t = config.main[last], units[last]
    weight, bias = product_parameters(t, x.dtype)
    moments, expanded = None, frozen_vectors(ops, unit, t, x)
    if expanded is None:
        m, S = ops(Gram(c, v.scale, v.shift))
        mean, var, center = ops(GramOutputStats(weight, bias, m, S))
        moments = m, S, center
        expanded = vectors_of_batch(ops, unit, t, mean, var)
    vectors.append(expanded)

    residual_scale = residual_shift = None
    projected = None
    if config.projection is not None:
        frozen = frozen_vectors(ops, config.projection, units[-1], x)
        residual, v_shortcut = conv_bn_forward(ops, x, config.projection, units[-1], frozen)
        projected = residual
        vectors.append(v_shortcut)
        residual_scale, residual_shift = v_shortcut.scale, v_shortcut.shift
    elif config.shortcut is Shortcut.IDENTITY:
        residual = x
    out = ops(
        Conv1x1Forward(
            c,
            weight,
            bias,
            in_scale=v.scale,
            in_shift=v.shift,
            scale=vectors[last].scale,
            shift=vectors[last].shift,
            residual=residual,
            residual_scale=residual_scale,
            residual_shift=residual_shift,
            relu=unit.relu,
            save_mask=save and unit.relu,
        )
    )
    if not save:
        return BlockOutput(out.y, tuple(vectors), None)
    raw = (*convs, None) if projected is None else (*convs, None, projected)
    return BlockOutput(out.y, tuple(vectors), Saved((), raw, tuple(vectors), out.mask, moments))


class ExpansionGrads(NamedTuple):
    """Gradients of the last convolution and its BN, and of what lies below it."""

    parameters: ConvBNGrads
    dz_below: Tensor | None  # [N, Cin, H, W], through the ReLU below
    sums_below: tuple[Tensor, Tensor] | None  # [Cin] each: for the BN below


def expansion_backward(
    ops: Dispatcher,
    config: BlockConfig,
    t: ConvBNTensors,
    saved: Saved,
    dy: Tensor,
    needs: ConvBNNeeds,
    need_da: bool,
) -> ExpansionGrads:
    """Backward of BN(a W^T + b) without c, see the head of this file. dy [N, Cout, H, W]."""
    last = len(config.main) - 1
    unit, below, v = config.main[last], saved.vectors[last - 1], saved.vectors[last]
    c_below = saved.convs[last - 1]
    assert c_below is not None
    weight, bias = product_parameters(t, c_below.dtype)
    m, S, center = saved.moments or (None, None, None)
    r, sum_dz = ops(Conv1x1BackwardWeight(dy, saved.mask, c_below, below.scale, below.shift, center))
    grads = ops(GramBackwardCoefficients(r, sum_dz, weight, bias, v, rows(c_below), m, S, center))
    db = None
    if needs.conv_bias:
        db = torch.zeros_like(sum_dz) if unit.training else v.scale * sum_dz
    parameters = ConvBNGrads(
        grads.dW if needs.weight else None,
        None if db is None else like_parameter(db, t.conv_bias),  # type: ignore[arg-type]
        like_parameter(grads.dweight, t.bn_weight) if needs.bn_weight else None,  # type: ignore[arg-type]
        like_parameter(sum_dz, t.bn_bias) if needs.bn_bias else None,  # type: ignore[arg-type]
    )
    if not need_da:
        return ExpansionGrads(parameters, None, None)
    dz_below, *sums = ops(
        Conv1x1GramBackwardInput(
            dy, saved.mask, c_below, below, grads.weight_dz, grads.weight_a, center, grads.offset
        )
    )
    return ExpansionGrads(parameters, dz_below, tuple(sums))


def backward(
    ops: Dispatcher,
    config: BlockConfig,
    x: Tensor,
    units: tuple[ConvBNTensors, ...],
    saved: Saved,
    dy: Tensor,
    needs: BlockNeeds,
) -> BlockGrads:
    """Gradients of everything that `needs` names, from dy like y."""
    last = len(config.main) - 1
    top = expansion_backward(ops, config, units[last], saved, dy, needs.units[last], needs.below(last))
    unit_grads = [top.parameters]
    da, sums = top.dz_below, top.sums_below
    dx_shortcut, projection_grads = None, None
    if config.projection is not None:
        dx_shortcut, projection_grads = projection_backward(ops, config, x, units[-1], saved, dy, needs)
    # the shortcut's gradient is added by the first convolution's input gradient, where that is a plain 1x1
    identity = config.shortcut is Shortcut.IDENTITY
    joined = needs.x and last > 1 and is_plain_1x1(config.main[0], units[0])
    joined = joined and (identity or dx_shortcut is not None)
    shortcut_grad = (dy, saved.mask) if identity else (dx_shortcut, None)
    for i in reversed(range(last)):
        if da is None:
            unit_grads.append(ConvBNGrads(None, None, None, None))
            continue
        unit, t, c, v = config.main[i], units[i], saved.convs[i], saved.vectors[i]
        assert c is not None
        if i == 0 and joined:
            da, grads = joined_input_gradient(ops, da, x, c, v, unit, t, needs.units[0], *shortcut_grad)
        else:
            a = x if i == 0 else remade_activation(ops, config, saved, i - 1)
            da, grads = conv_bn_backward(ops, da, a, c, v, unit, t, needs.units[i], needs.below(i), sums)
        unit_grads.append(grads)
        sums = None
    unit_grads.reverse()

    dx, dresidual = da, None
    if projection_grads is not None:
        unit_grads.append(projection_grads)
        if dx is not None and dx_shortcut is not None and not joined:
            dx = dx.add_(dx_shortcut)
    elif identity and needs.x and not joined:
        assert dx is not None
        dx = dx.add_(dy if saved.mask is None else ops(ReluBackward(dy, saved.mask)))
    elif config.shortcut is Shortcut.TENSOR and needs.residual:
        dresidual = dy.clone() if saved.mask is None else ops(ReluBackward(dy, saved.mask))
    return BlockGrads(dx, dresidual, tuple(unit_grads))


def remade_activation(ops: Dispatcher, config: BlockConfig, saved: Saved, index: int) -> Tensor:
    """The activation after main[index], which forward did not keep."""
    c, v = saved.convs[index], saved.vectors[index]
    assert c is not None
    return ops(BnAddReluForward(c, v.scale, v.shift, relu=config.main[index].relu))[0]


def joined_input_gradient(
    ops: Dispatcher,
    da: Tensor,
    x: Tensor,
    c: Tensor,
    v: BatchNormVectors,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    needs: ConvBNNeeds,
    shortcut_dy: Tensor | None,
    shortcut_mask: Tensor | None,
) -> tuple[Tensor, ConvBNGrads]:
    """Backward of relu(BN(conv1x1(x))), plus the shortcut's gradient, in one product: dx, parameter gradients."""
    sum_dz, centered, _ = ops(BnAddReluBackwardReduce(da, c, v, relu=unit.relu))
    grads = grads_of_batch(ops, unit, v, c, sum_dz, centered)
    dx, dc = ops(
        Conv1x1BackwardInput(da, c, v, grads, t.weight.to(x.dtype), unit.relu, shortcut_dy, shortcut_mask)
    )
    _, dweight, dbias = convolution_backward(ops, dc, x, unit, t, needs, False)
    return dx, ConvBNGrads(dweight, dbias, *bn_parameter_grads(grads, t, needs))


def projection_backward(
    ops: Dispatcher,
    config: BlockConfig,
    x: Tensor,
    t: ConvBNTensors,
    saved: Saved,
    dy: Tensor,
    needs: BlockNeeds,
) -> tuple[Tensor | None, ConvBNGrads]:
    """dx and the parameter gradients of a projection shortcut."""
    unit, c, v = config.projection, saved.convs[-1], saved.vectors[-1]
    assert unit is not None and c is not None
    sum_dz, centered, _ = ops(BnAddReluBackwardReduce(dy, c, v, saved.mask, False))
    grads = grads_of_batch(ops, unit, v, c, sum_dz, centered)
    dc, _ = ops(BnAddReluBackwardInput(dy, c, v, grads, saved.mask, False))
    dx, dweight, dbias = convolution_backward(ops, dc, x, unit, t, needs.units[-1], needs.x)
    return dx, ConvBNGrads(dweight, dbias, *bn_parameter_grads(grads, t, needs.units[-1]))
