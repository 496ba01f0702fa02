"""How often the operators of blocks and stems multiply, see `fusedres.ops.flops`: `separate` as often as eager."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fusedres.autograd.operator import PARAMETERS, BlockConstants
from fusedres.blocks.config import BlockConfig, BlockNeeds, ConvBNConfig, ConvBNNeeds, output_size
from fusedres.ops import flops
from fusedres.ops.flops import (
    Shape,
    conv1x1_backward_weight,
    conv1x1_gram_backward_input,
    convolution,
    convolution_gradients,
    gram,
    gram_backward_coefficients,
    gram_output_stats,
)


def unit_shapes(
    units: Sequence[ConvBNConfig], weights: Sequence[Shape], x: Shape
) -> Iterator[tuple[Shape, Shape, Shape]]:
    """Of each convolution in a chain from x: its input, weight and output."""
    for unit, weight in zip(units, weights, strict=True):
        sizes = (x[2], x[3]), (weight[2], weight[3])
        y = x[0], weight[0], *output_size(*sizes, unit.stride, unit.padding, unit.dilation)
        yield x, weight, y
        x = y


def block_shapes(
    config: BlockConfig, constants: BlockConstants, tensors: list[Any], x: Shape
) -> list[tuple[Shape, Shape, Shape]]:
    """The same of each unit of a block, as `config.units`."""
    weights: list[Any] = [unit.weight for unit in constants.tensors(tensors)]
    main = len(config.main)
    return [
        *unit_shapes(config.main, weights[:main], x),
        *unit_shapes(config.units[main:], weights[main:], x),
    ]


def residual_block_forward(x: Shape, residual: Any, tensors: list[Any], *rest: Any, out_shape: Any) -> int:
    constants = BlockConstants(*rest[:-1])
    config = constants.config
    shapes = block_shapes(config, constants, tensors, x)
    total = sum(convolution(*unit) for unit in shapes)
    if constants.recipe == "gram" and config.main[-1].training:
        given, weight, _ = shapes[len(config.main) - 1]
        total += gram(given) + gram_output_stats(weight)
    return total


def residual_block_backward(
    dy: Shape,
    x: Shape,
    tensors: list[Any],
    saved: Any,
    flags: list[bool],
    channels_last: bool,
    *rest: Any,
    out_shape: Any,
) -> int:
    constants = BlockConstants(*rest)
    config = constants.config
    units = [ConvBNNeeds(*flags[i : i + PARAMETERS]) for i in range(2, len(flags), PARAMETERS)]
    needs = BlockNeeds(flags[0], flags[1], tuple(units))
    main, total = len(config.main), 0
    for i, (given, weight, out) in enumerate(block_shapes(config, constants, tensors, x)):
        dx = needs.below(i) if i < main else needs.x
        if constants.recipe == "gram" and i == main - 1:
            total += expansion_gradients(given, weight, out, config.main[i].training, dx)
        else:
            total += convolution_gradients(given, weight, out, dx, units[i].weight)
    return total


def expansion_gradients(x: Shape, weight: Shape, y: Shape, training: bool, dx: bool) -> int:
    """Of the last convolution of a block in Gram form: its weight's gradient comes with BN's sums, asked for or not."""
    total = conv1x1_backward_weight(y, x) + gram_backward_coefficients(weight, training)
    return total + (conv1x1_gram_backward_input(y, x, training) if dx else 0)


def register() -> None:
    """Those of the operators above, and of the native library's, which are loaded with the backends."""
    of_blocks = residual_block_forward, residual_block_backward
    flops.register("fusedres", {formula.__name__: formula for formula in of_blocks})
    flops.register("fusedres_native", flops.NATIVE)
