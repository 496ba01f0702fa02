"""From matched operations to the modules that made them: by path, with the attributes held against the dataflow.

An operation counts as a module's only if it was made in that module's one call. A function that is given a module's
parameters has arguments of its own: geometry, mode, momentum.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fusedres.matching.dataflow import PARAMETER, Dataflow, Node
from fusedres.matching.norms import Norm
from fusedres.matching.plan import ConvBNNames, Geometry
from fusedres.nn.numbers import UnusualNumberError, pair, whole

SIZES = "stride", "padding", "dilation"  # of a convolution, for height and width


class Unit(NamedTuple):
    """One BN(Conv(.)) as matched."""

    conv: Node
    norm: Norm
    relu: bool  # a ReLU follows, inside the chain


class NoMatch(Exception):
    """The expression is not a block; `code` says why."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def owner(path: str | None, leaf: str) -> str:
    """The module path of a parameter or buffer that must be called `leaf`."""
    head, _, name = (path or "").rpartition(".")
    if name != leaf:
        raise NoMatch("unsupported_module")
    return head


def parameter(node: Node | None) -> str | None:
    if node is None:
        return None
    if node.op != PARAMETER or node.name is None:
        raise NoMatch("unsupported_op:weight is computed")
    return node.name


def check_called(flow: Dataflow, path: str) -> None:
    """Raises NoMatch unless the module was called once."""
    calls = len(flow.outputs.get(path, ()))
    if calls != 1:
        raise NoMatch("shared_module" if calls else "not_called")


def bn_owner(module: nn.Module, flow: Dataflow, bn: Node) -> str:
    """The path of the BatchNorm2d whose one call returned a BN node."""
    path = flow.made_in.get(id(bn))
    if not path:
        raise NoMatch("not_called")
    if type(module.get_submodule(path)) is not nn.BatchNorm2d:
        raise NoMatch(f"unsupported_module:{type(module.get_submodule(path)).__name__}")
    check_called(flow, path)
    if flow.outputs[path] != [id(bn)]:
        raise NoMatch("not_called")
    return path


def conv_owner(flow: Dataflow, conv: Node) -> str:
    """The path of the module in whose one call a convolution was made of its own parameters."""
    path = owner(parameter(conv.args[1]), "weight")
    if flow.made_in.get(id(conv)) != path:
        raise NoMatch("not_called")
    check_called(flow, path)
    return path


def names(module: nn.Module, flow: Dataflow, unit: Unit) -> ConvBNNames:
    """The unit by module paths, its modules' attributes held against the dataflow."""
    conv_path = conv_owner(flow, unit.conv)
    conv, frozen = module.get_submodule(conv_path), unit.norm.frozen
    if not isinstance(conv, nn.Conv2d):
        raise NoMatch(f"unsupported_module:{type(conv).__name__}")
    made, found = geometry(conv), unit.conv.attributes
    if (*(pair(found[name], name) for name in SIZES), found["groups"]) != made:
        raise NoMatch("unsupported_module")
    if parameter(unit.conv.args[2]) != (None if conv.bias is None else f"{conv_path}.bias"):
        raise NoMatch("unsupported_module")
    if frozen is not None:
        return ConvBNNames(conv_path, frozen.path, unit.relu, made, True, frozen.eps)
    bn_path = bn_owner(module, flow, unit.norm.node)
    if module.get_submodule(bn_path).eps != unit.norm.node.attributes["eps"]:
        raise NoMatch("unsupported_module")
    return ConvBNNames(conv_path, bn_path, unit.relu, made)


def geometry(conv: nn.Conv2d) -> Geometry:
    """The convolution's numbers as torch reads them. Raises NoMatch where one is none that a recipe takes."""
    try:
        stride, padding, dilation = (pair(getattr(conv, name), name) for name in SIZES)
        return stride, padding, dilation, whole(conv.groups, "groups")
    except UnusualNumberError as error:
        raise NoMatch(error.code) from error
