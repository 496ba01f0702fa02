"""Recipe `separate`: library convolutions, with each BN, addition and ReLU between them in one pass.

Keeps, besides the block's input x: every raw convolution output c, every inner activation a, and one mask bit per
element of y. An identity bottleneck in a chain keeps x4 c1 a1 c2 a2 c3(4) mask = 12.25 narrow tensors in bf16. A stem's
BN, ReLU and pooling are one pass over c, the largest tensor of the network: it keeps c and one byte per pooled element,
where eager keeps c, the activation and eight bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.blocks.config import (
    BlockConfig,
    BlockGrads,
    BlockNeeds,
    BlockOutput,
    ConvBNConfig,
    ConvBNGrads,
    ConvBNTensors,
    Saved,
    Shortcut,
)
from fusedres.blocks.conv_bn import Unstored, conv_bn_add_relu, conv_bn_forward, convolve, unstored
from fusedres.blocks.conv_bn_backward import (
    Onto,
    bn_parameter_grads,
    conv_bn_backward,
    convolution_backward,
    onto_masked,
)
from fusedres.blocks.statistics import frozen_vectors, grads_of_batch
from fusedres.ops.contract import (
    BatchNormVectors,
    BnAddReluBackwardInput,
    BnAddReluBackwardReduce,
    BnAddReluForward,
    BnReluMaxpoolBackwardInput,
    BnReluMaxpoolBackwardReduce,
    BnReluMaxpoolForward,
)
from fusedres.ops.dispatch import Dispatcher

BYTES_OF_PART = 8 << 20  # of a stem's c in inference: what the caches hold, and the C library gives out again
KEEPS_ACTIVATIONS = True
MAKES_ACTIVATIONS = False


def forward(
    ops: Dispatcher,
    config: BlockConfig,
    x: Tensor,
    residual: Tensor | None,
    units: tuple[ConvBNTensors, ...],
    save: bool,
    in_prologues: bool = False,
) -> BlockOutput:
    """y [N, Cout, H', W'] from x [N, Cin, H, W]; residual like y with Shortcut.TENSOR, else None.

    in_prologues: whether convolutions that can are to make their own activations (recipe `prologue`).
    """
    if config.pool is not None:
        return pooled_forward(ops, config, x, units[0], save)
    last = len(config.main) - 1
    activations: list[Tensor | None] = []
    convs: list[Tensor | None] = []
    vectors: list[BatchNormVectors] = []
    # Frozen vectors need no convolution: all are formed now, before the convolutions fill the caches.
    frozen = [frozen_vectors(ops, unit, t, x) for unit, t in zip(config.units, units, strict=True)]
    shortcut: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    projected: tuple[Tensor | None, BatchNormVectors] | None = None
    a: Tensor | Unstored = x
    mask = None
    for i, (unit, t) in enumerate(zip(config.main, units, strict=False)):
        if i == last and config.projection is not None:
            projected, shortcut = project(ops, x, config.projection, units[-1], frozen[-1], save)
        elif i == last:
            shortcut = x if config.shortcut is Shortcut.IDENTITY else residual, None, None
        known = None if save else frozen[i]
        y: Tensor | Unstored | None = None
        if known is not None:
            y = conv_bn_add_relu(ops, a, unit, t, known, unit.relu, shortcut)
        if known is not None and y is not None:
            vectors.append(known)
        else:
            c, v = conv_bn_forward(ops, a, unit, t, frozen[i])
            y = None
            if in_prologues and i < last and unit.relu:
                y = unstored(ops, c, v, config.main[i + 1], units[i + 1], frozen[i + 1] is None)
            if y is None:
                save_mask = save and unit.relu and i == last
                y, mask = ops(
                    BnAddReluForward(c, v.scale, v.shift, *shortcut, unit.relu, save_mask, not save)
                )
            vectors.append(v)
            if save:  # what nobody keeps is freed as the block goes on
                convs.append(c)
                activations.append(None if isinstance(y, Unstored) else y)
        a = y
    assert not isinstance(a, Unstored)  # the join stores y
    if projected is not None:
        convs.append(projected[0])
        vectors.append(projected[1])
    saved = Saved(tuple(activations[:last]), tuple(convs), tuple(vectors), mask, None) if save else None
    return BlockOutput(a, tuple(vectors), saved)


def project(
    ops: Dispatcher,
    x: Tensor,
    unit: ConvBNConfig,
    t: ConvBNTensors,
    frozen: BatchNormVectors | None,
    save: bool,
) -> tuple[tuple[Tensor | None, BatchNormVectors], tuple[Tensor, Tensor | None, Tensor | None]]:
    """The projection's raw output, if it is stored, and its BN's vectors; the shortcut, and scale and shift of its BN
    if that is still to come.
    """
    if frozen is not None and not save:
        residual = conv_bn_add_relu(ops, x, unit, t, frozen, relu=False)
        if residual is not None:
            return (None, frozen), (residual, None, None)
    c, v = conv_bn_forward(ops, x, unit, t, frozen)
    return (c, v), (c, v.scale, v.shift)


def backward(
    ops: Dispatcher,
    config: BlockConfig,
    x: Tensor,
    units: tuple[ConvBNTensors, ...],
    saved: Saved,
    dy: Tensor,
    needs: BlockNeeds,
    in_prologues: bool = False,
) -> BlockGrads:
    """Gradients of everything that `needs` names, from dy like y. in_prologues: as in `forward`."""
    if config.pool is not None:
        return pooled_backward(ops, config, x, units[0], saved, dy, needs)
    last = len(config.main) - 1
    unit, c, v = config.main[last], saved.convs[last], saved.vectors[last]
    projection, shortcut = config.projection, config.shortcut
    cs, vs = (saved.convs[-1], saved.vectors[-1]) if projection is not None else (None, None)
    assert c is not None

    # the join: one pass for the sums of both BNs, one for dc and the shortcut's gradient
    shortcut_mean = None if vs is None else vs.mean
    sum_dz, sum_main, sum_shortcut = ops(
        BnAddReluBackwardReduce(dy, c, v, saved.mask, False, cs, shortcut_mean)
    )
    grads = grads_of_batch(ops, unit, v, c, sum_dz, sum_main)
    grads_shortcut = None
    if projection is not None and vs is not None:
        grads_shortcut = grads_of_batch(ops, projection, vs, c, sum_dz, sum_shortcut)
    identity, onto, first = shortcut is Shortcut.IDENTITY, None, saved.convs[0]
    if identity and needs.x and first is not None:
        masked = Onto(dy, saved.mask)
        onto = onto_masked(
            ops, first, saved.vectors[0], x, config.main[0], units[0], masked, in_prologues and last > 0
        )
    save_dz = (identity and needs.x and onto is None) or (shortcut is Shortcut.TENSOR and needs.residual)
    dc, dshortcut = ops(
        BnAddReluBackwardInput(
            dy, c, v, grads, saved.mask, False, cs, grads_shortcut, save_dz, reuse_c=not needs.saved
        )
    )
    if identity and dshortcut is not None:
        onto = Onto(dshortcut)

    unit_grads: list[ConvBNGrads] = []
    a = input_of(config, last, x, saved)
    da, dweight, dbias = convolution_backward(
        ops, dc, a, unit, units[last], needs.units[last], needs.below(last), None if last else onto
    )
    unit_grads.append(ConvBNGrads(dweight, dbias, *bn_parameter_grads(grads, units[last], needs.units[last])))
    for i in reversed(range(last)):
        c = saved.convs[i]
        if da is None or c is None:
            unit_grads.append(ConvBNGrads(None, None, None, None))
            continue
        a = input_of(config, i, x, saved)
        da, grads_i = conv_bn_backward(
            ops,
            da,
            a,
            c,
            saved.vectors[i],
            config.main[i],
            units[i],
            needs.units[i],
            needs.below(i),
            onto=None if i else onto,
            with_bn=in_prologues,
        )
        unit_grads.append(grads_i)
    unit_grads.reverse()

    dx, dresidual = da, dshortcut if shortcut is Shortcut.TENSOR else None
    if projection is not None and grads_shortcut is not None:
        joined = None if dx is None else Onto(dx)
        dx, dweight, dbias = convolution_backward(
            ops, dshortcut, x, projection, units[-1], needs.units[-1], needs.x, joined
        )
        parameter_grads = bn_parameter_grads(grads_shortcut, units[-1], needs.units[-1], shared=True)
        unit_grads.append(ConvBNGrads(dweight, dbias, *parameter_grads))
    return BlockGrads(dx, dresidual, tuple(unit_grads))


def input_of(config: BlockConfig, i: int, x: Tensor, saved: Saved) -> Tensor | Unstored:
    """What main[i] convolves."""
    if i == 0:
        return x
    kept, c = saved.activations[i - 1], saved.convs[i - 1]
    if kept is not None:
        return kept
    assert c is not None and config.main[i - 1].relu
    return Unstored(c, saved.vectors[i - 1])


def pooled_forward(
    ops: Dispatcher, config: BlockConfig, x: Tensor, t: ConvBNTensors, save: bool
) -> BlockOutput:
    """`forward` of a stem: y [N, Cout, H'', W'']."""
    assert config.pool is not None
    (unit,) = config.main
    frozen = frozen_vectors(ops, unit, t, x)
    if frozen is not None and not save and (images := images_of_part(x, unit, t)) < x.shape[0]:
        v, indices = frozen, None
        parts = (convolve(part, unit, t) for part in x.split(images))
        y = torch.cat([ops(BnReluMaxpoolForward(c, v.scale, v.shift, *config.pool, save))[0] for c in parts])
    else:
        c, v = conv_bn_forward(ops, x, unit, t, frozen)
        y, indices = ops(BnReluMaxpoolForward(c, v.scale, v.shift, *config.pool, save))
    return BlockOutput(y, (v,), Saved((), (c,), (v,), indices, None) if save else None)


def images_of_part(x: Tensor, unit: ConvBNConfig, t: ConvBNTensors) -> int:
    """How many images of x a stem convolves at once in inference: on a CPU so few that c stays in the caches."""
    n, _, height, width = x.shape
    if not x.is_cpu or n * height * width == 0:
        return n
    sides = height // unit.stride[0], width // unit.stride[1]
    bytes_of_image = t.weight.shape[0] * sides[0] * sides[1] * x.element_size()
    return max(torch.get_num_threads(), BYTES_OF_PART // max(1, bytes_of_image))


def pooled_backward(
    ops: Dispatcher,
    config: BlockConfig,
    x: Tensor,
    t: ConvBNTensors,
    saved: Saved,
    dy: Tensor,
    needs: BlockNeeds,
) -> BlockGrads:
    """`backward` of a stem."""
    (unit,), (wanted,), (c,), (v,), indices = config.main, needs.units, saved.convs, saved.vectors, saved.mask
    assert config.pool is not None and c is not None and indices is not None
    sums = ops(BnReluMaxpoolBackwardReduce(dy, indices, c, v, *config.pool))
    grads = grads_of_batch(ops, unit, v, c, *sums)
    parameters = bn_parameter_grads(grads, t, wanted)
    if not (needs.x or wanted.weight or wanted.conv_bias):
        return BlockGrads(None, None, (ConvBNGrads(None, None, *parameters),))
    dc = ops(BnReluMaxpoolBackwardInput(dy, indices, c, grads, *config.pool))
    dx, dweight, dbias = convolution_backward(ops, dc, x, unit, t, wanted, needs.x)
    return BlockGrads(dx, None, (ConvBNGrads(dweight, dbias, *parameters),))
