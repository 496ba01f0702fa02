"""Normalisations in a dataflow expression: torch's batch_norm, or one with frozen constants, written out.

    frozen = x*scale + shift    scale = weight * rsqrt(running_var + eps),  shift = bias - running_mean*scale

A frozen norm is matched when its expression is exactly that, over the four vectors of one module.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from torch import nn

from fusedres.matching.dataflow import PARAMETER, Node
from fusedres.matching.dry_run import EPS_PROBE
from fusedres.modules.tree import FROZEN_TENSORS

BN = "NativeBatchNorm"
RESHAPES = ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze")


class Frozen(NamedTuple):
    """A frozen norm's module, and its eps where that is a constant of its forward; None: its attribute eps."""

    path: str
    eps: float | None


class Norm(NamedTuple):
    """A normalisation as matched: what it is applied to, its own node, and, unless torch's, what it is frozen to."""

    input: Node
    node: Node
    frozen: Frozen | None


class FrozenNorm:
    """A frozen norm, read as torch's BatchNorm2d in evaluation mode is; `eps` as in `Frozen`."""

    training = False
    momentum = None

    def __init__(self, module: nn.Module, eps: float | None) -> None:
        self._parameters, self._buffers = module._parameters, module._buffers
        self.eps = module.eps if eps is None else eps


def read_norm(node: Node | None) -> Norm | None:
    """The normalisation whose output `node` is, or None."""
    if node is None:
        return None
    if node.op == BN:
        return None if node.args[0] is None else Norm(node.args[0], node, None)
    for product, shift in operands(node, "Add"):
        for x, scale in operands(product, "Mul"):
            if (frozen := affine(scale, shift, node.shape)) is not None:
                return Norm(x, node, frozen)
    return None


def operands(node: Node, op: str) -> Iterator[tuple[Node, Node]]:
    """Both operands of a sum or product, in either order; nothing where it is another operation."""
    if node.op != op or len(node.args) != 2 or node.attributes.get("alpha", 1) != 1:
        return
    first, second = node.args
    if first is not None and second is not None:
        yield first, second
        yield second, first


def unshaped(node: Node | None) -> Node | None:
    """The node under views that keep the order of elements."""
    while node is not None and node.op in RESHAPES:
        node = node.args[0]
    return node


def affine(scale: Node, shift: Node, shape: tuple[int, ...]) -> Frozen | None:
    """What a norm is frozen to, from its scale and shift as added to and multiplied with [N, C, H, W]."""
    per_channel = (1, shape[1], 1, 1) if len(shape) == 4 else None
    if scale.shape != per_channel or shift.shape != per_channel:
        return None
    vectors = [n for n in (*scale.walk(), *shift.walk()) if n.op != PARAMETER]
    if any(prod(n.shape) != shape[1] for n in vectors):
        return None
    difference = unshaped(shift)
    if difference is None or difference.op != "Sub" or difference.attributes["alpha"] != 1:
        return None
    bias, moved = (unshaped(n) for n in difference.args)
    mean = None if moved is None else other_factor(moved, unshaped(scale))
    weight, invstd = factors(unshaped(scale))
    variance = None if invstd is None else unshaped(invstd.args[0])
    if variance is None or variance.op != "Add" or variance.args[1] is not None:
        return None
    eps = variance.attributes.get("number")
    path = owner_of([weight, bias, mean, unshaped(variance.args[0])])
    if path is None or eps is None or variance.attributes["alpha"] != 1:
        return None
    return Frozen(path, None if eps == EPS_PROBE else float(eps))


def other_factor(product: Node, factor: Node | None) -> Node | None:
    """The other operand of a product that has `factor` as one, under views."""
    for one, other in operands(product, "Mul"):
        if unshaped(other) is factor:
            return unshaped(one)
    return None


def factors(scale: Node | None) -> tuple[Node | None, Node | None]:
    """weight and rsqrt(...) of their product, or None twice."""
    if scale is not None:
        for weight, invstd in operands(scale, "Mul"):
            root = unshaped(invstd)
            if root is not None and root.op == "Rsqrt":
                return unshaped(weight), root
    return None, None


def owner_of(parameters: list[Node | None]) -> str | None:
    """The path of the module whose weight, bias, running_mean and running_var these are, in that order."""
    paths = set()
    for node, leaf in zip(parameters, FROZEN_TENSORS, strict=True):
        if node is None or node.op != PARAMETER or node.name is None:
            return None
        path, _, name = node.name.rpartition(".")
        if name != leaf:
            return None
        paths.add(path)
    return paths.pop() if len(paths) == 1 else None
