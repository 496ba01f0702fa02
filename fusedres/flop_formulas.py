"""How often the operators multiply, for `torch.utils.flop_counter` and every tool that reads its registry.

A formula is given the operator's arguments and its result with shapes in place of tensors. A convolution and its
gradients count as torch's own do, so `separate` counts what eager counts; of a Gram form every matrix product counts.
Importing torch's counter takes half a second where Triton is installed: it is given the formulas when somebody
imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from fusedres.blocks.config import BlockConfig, BlockNeeds, ConvBNConfig, ConvBNNeeds, output_size
from fusedres.opaque_blocks import PARAMETERS, BlockConstants
from fusedres.opaque_stem import tensors_of

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def torch_formula(op: Any) -> Callable[..., int]:
    return sys.modules[COUNTER].flop_registry[op]


def convolution(x: Shape, weight: Shape, y: Shape) -> int:
    return torch_formula(torch.ops.aten.convolution)(x, weight, None, None, None, None, False, out_val=y)


def convolution_gradients(x: Shape, weight: Shape, dy: Shape, dx: bool, dweight: bool) -> int:
    formula, wanted = torch_formula(torch.ops.aten.convolution_backward), [dx, dweight, False]
    return formula(dy, x, weight, None, None, None, None, False, None, 1, wanted, out_val=(x, weight, None))


def product(rows: int, inner: int, columns: int) -> int:
    return torch_formula(torch.ops.aten.mm)((rows, inner), (inner, columns))


def positions(c: Shape) -> int:
    """P of [N, C, H, W]."""
    return c[0] * c[2] * c[3]


# ---------------------------------------------------------------- raw ops, named as there


def gram(c: Shape, *rest: Any, **options: Any) -> int:
    return product(c[1], positions(c), c[1])


def gram_output_stats(weight: Shape, *rest: Any, **options: Any) -> int:
    return product(weight[0], weight[1], weight[1])


def gram_backward_coefficients(
    r: Shape,
    sum_dz: Shape,
    weight: Shape,
    bias: Any,
    vectors: Any,
    rows: int,
    m: Any = None,
    *rest: Any,
    **options: Any,
) -> int:
    if m is None:
        return 0
    cout, cin = r
    offset = product(1, cout, cin) + product(1, cin, cin)
    return product(cout, cin, cin) + product(cin, cout, cin) + offset


def conv1x1_backward_weight(dy: Shape, mask: Any, c: Shape, *rest: Any, **options: Any) -> int:
    return product(dy[1], positions(dy), c[1])


def conv1x1_gram_backward_input(
    dy: Shape,
    mask: Any,
    c: Shape,
    vectors: Any,
    weight_dz: Shape,
    weight_a: Any = None,
    *rest: Any,
    **options: Any,
) -> int:
    below = 0 if weight_a is None else product(positions(c), c[1], c[1])
    return product(positions(dy), dy[1], c[1]) + below


def conv1x1_forward(x: Shape, weight: Shape, *rest: Any, out_shape: Any, **options: Any) -> int:
    return convolution(x, weight, out_shape[0])


def conv1x1_backward_input(
    dy: Shape, c: Shape, vectors: Any, grads: Any, weight: Shape, *rest: Any, **options: Any
) -> int:
    x = c[0], weight[1], *c[2:]
    return convolution_gradients(x, weight, dy, True, False)


def conv_backward_weight(dy: Shape, x: Shape, *rest: Any, out_shape: Shape, **options: Any) -> int:
    return convolution_gradients(x, out_shape, dy, False, True)


def conv_backward_input(dy: Shape, x: Shape, weight: Shape, *rest: Any, **options: Any) -> int:
    return convolution_gradients(x, weight, dy, True, False)


def conv_bias_add_relu_forward(x: Shape, weight: Shape, *rest: Any, out_shape: Shape, **options: Any) -> int:
    return convolution(x, weight, out_shape)


# ---------------------------------------------------------------- the native library's operators


def native_conv1x1_forward(x: Shape, weight: Shape, *rest: Any, out_shape: Shape) -> int:
    return convolution(x, weight, out_shape)


def native_conv_backward_input(dy: Shape, weight: Shape, *rest: Any, out_shape: Shape) -> int:
    return convolution_gradients(out_shape, weight, dy, True, False)


def native_conv_backward_input_onto(dx: Shape, dy: Shape, weight: Shape, *rest: Any, out_shape: None) -> int:
    return convolution_gradients(dx, weight, dy, True, False)


# ---------------------------------------------------------------- blocks and the stem


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
    matrix, moments = weight[:2], x if training else None
    total = conv1x1_backward_weight(y, None, x)
    total += gram_backward_coefficients(matrix, (), weight, None, None, 0, moments)
    return total + (conv1x1_gram_backward_input(y, None, x, None, matrix, moments) if dx else 0)


def stem_forward(x: Shape, tensors: list[Any], present: list[bool], *rest: Any, out_shape: Any) -> int:
    weight: Any = tensors_of(tensors, present).weight
    return convolution(x, weight, out_shape[1])


def stem_backward(
    dy: Shape,
    x: Shape,
    tensors: list[Any],
    saved: list[Any],
    needs: list[bool],
    channels_last: bool,
    present: list[bool],
    *rest: Any,
    out_shape: Any,
) -> int:
    weight: Any = tensors_of(tensors, present).weight
    return convolution_gradients(x, weight, saved[0], needs[0], needs[1])


FORMULAS: dict[str, dict[str, Callable[..., int]]] = {
    "fusedres": {
        formula.__name__: formula
        for formula in (
            gram,
            gram_output_stats,
            gram_backward_coefficients,
            conv1x1_backward_weight,
            conv1x1_gram_backward_input,
            conv1x1_forward,
            conv1x1_backward_input,
            conv_backward_weight,
            conv_backward_input,
            conv_bias_add_relu_forward,
            residual_block_forward,
            residual_block_backward,
            stem_forward,
            stem_backward,
        )
    },
    "fusedres_native": {
        "conv1x1_forward": native_conv1x1_forward,
        "conv_backward_input": native_conv_backward_input,
        "conv_backward_input_": native_conv_backward_input_onto,
        "conv_backward_weight": conv_backward_weight,
    },
}


def register(counter: ModuleType) -> None:
    """Gives torch's counter the formulas of all operators that there are: without the native library, of the others."""
    for namespace, formulas in FORMULAS.items():
        for name, formula in formulas.items():
            op = getattr(getattr(torch.ops, namespace), name, None)
            if op is not None and op not in counter.flop_registry:
                counter.register_flop_formula(op)(formula)


class AtImport(MetaPathFinder):
    """Registers the formulas as soon as somebody imports torch's counter: finds it as the others do."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        others = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_now_or_at_import() -> None:
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, AtImport())
