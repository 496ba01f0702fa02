"""How often the operators multiply, for `torch.utils.flop_counter` and every tool that reads its registry.

A formula is given the operator's arguments and its result with shapes in place of tensors. A convolution and its
gradients count as torch's own do; of a Gram form every product of matrices counts. `fusedres.autograd.flops` has the
blocks' formulas. Importing torch's counter takes half a second where Triton is installed: it is given the formulas
when somebody imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"
FORMULAS: dict[str, dict[str, Callable[..., int]]] = {}  # by the operators' namespace and name
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


# ---------------------------------------------------------------- the products of a Gram form, named as its raw ops


def gram(c: Shape) -> int:
    return product(c[1], positions(c), c[1])


def gram_output_stats(weight: Shape) -> int:
    return product(weight[0], weight[1], weight[1])


def gram_backward_coefficients(weight: Shape, training: bool) -> int:
    if not training:
        return 0
    cout, cin = weight[:2]
    offset = product(1, cout, cin) + product(1, cin, cin)
    return product(cout, cin, cin) + product(cin, cout, cin) + offset


def conv1x1_backward_weight(dy: Shape, c: Shape) -> int:
    return product(dy[1], positions(dy), c[1])


def conv1x1_gram_backward_input(dy: Shape, c: Shape, training: bool) -> int:
    below = product(positions(c), c[1], c[1]) if training else 0
    return product(positions(dy), dy[1], c[1]) + below


# ---------------------------------------------------------------- the native library's operators


def conv1x1_forward(x: Shape, weight: Shape, *rest: Any, out_shape: Sequence[Any]) -> int:
    return convolution(x, weight, out_shape[0])


def conv_forward_out(x: Shape, weight: Shape, *rest: Any, out_shape: Any) -> int:
    return convolution(x, weight, rest[-1])


def conv1x1_backward_input(dy: Shape, c: Shape, *rest: Any, out_shape: Sequence[Any]) -> int:
    weight: Shape = rest[5]  # behind scale, shift, A, B and K
    return convolution_gradients(out_shape[0], weight, dy, True, False)


def conv_backward_input(dy: Shape, weight: Shape, *rest: Any, out_shape: Shape) -> int:
    return convolution_gradients(out_shape, weight, dy, True, False)


def conv_backward_input_out(dy: Shape, weight: Shape, *rest: Any, out_shape: Any) -> int:
    return convolution_gradients(rest[-1], weight, dy, True, False)


def conv_backward_input_onto(dx: Shape, dy: Shape, weight: Shape, *rest: Any, out_shape: None) -> int:
    return convolution_gradients(dx, weight, dy, True, False)


def conv_backward_weight(dy: Shape, x: Shape, *rest: Any, out_shape: Shape) -> int:
    return convolution_gradients(x, out_shape, dy, False, True)


def conv3x3_forward(x: Shape, weight: Shape, *rest: Any, out_shape: Sequence[Any]) -> int:
    return convolution(x, weight, out_shape[0])


def conv3x3_backward_input(dy: Shape, weight: Shape, *rest: Any, out_shape: Sequence[Any]) -> int:
    return convolution_gradients(out_shape[0], weight, dy, True, False)


def conv3x3_backward_weight(dy: Shape, x: Shape, *rest: Any, out_shape: Sequence[Any]) -> int:
    return convolution_gradients(x, out_shape[0], dy, False, True)


def native_gram_backward_coefficients(
    r: Shape, sum_dz: Shape, weight: Shape, *rest: Any, out_shape: Sequence[Any]
) -> int:
    return gram_backward_coefficients(weight, training=out_shape[-1] is not None)


def native_conv1x1_gram_backward_input(
    dy: Shape, mask: Any, c: Shape, *rest: Any, out_shape: Sequence[Any]
) -> int:
    return conv1x1_gram_backward_input(dy, c, training=rest[-1] is not None)


NATIVE: dict[str, Callable[..., int]] = {
    "conv1x1_forward": conv1x1_forward,
    "conv1x1_forward_out": conv_forward_out,
    "conv1x1_backward_input": conv1x1_backward_input,
    "conv1x1_backward_weight": lambda dy, mask, c, *rest, out_shape: conv1x1_backward_weight(dy, c),
    "gram": lambda c, *rest, out_shape: gram(c),
    "gram_output_stats": lambda weight, *rest, out_shape: gram_output_stats(weight),
    "gram_backward_coefficients": native_gram_backward_coefficients,
    "conv1x1_gram_backward_input": native_conv1x1_gram_backward_input,
    "conv_backward_input": conv_backward_input,
    "conv_backward_input_out": conv_backward_input_out,
    "conv_backward_input_": conv_backward_input_onto,
    "conv_backward_weight": conv_backward_weight,
    # as direct convolutions do: how much a model computes does not depend on the algorithm
    "conv3x3_forward": conv3x3_forward,
    "conv3x3_forward_out": conv_forward_out,
    "conv3x3_backward_input": conv3x3_backward_input,
    "conv3x3_backward_input_out": conv_backward_input_out,
    "conv3x3_backward_weight": conv3x3_backward_weight,
    "grouped_conv3x3_forward": lambda x, weight, *rest, out_shape: convolution(x, weight, out_shape),
    "grouped_conv3x3_forward_out": conv_forward_out,
    "grouped_conv3x3_backward_input": conv_backward_input,
    "grouped_conv3x3_backward_weight": conv_backward_weight,
}

# ---------------------------------------------------------------- torch's registry


def register(namespace: str, formulas: dict[str, Callable[..., int]]) -> None:
    """Gives torch's counter the formulas of operators, now or when it is imported; of those that there are by then."""
    FORMULAS.setdefault(namespace, {}).update(formulas)
    if COUNTER in sys.modules:
        hand_over(sys.modules[COUNTER])
    elif not any(isinstance(finder, AtImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AtImport())


def hand_over(counter: ModuleType) -> None:
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
                hand_over(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
