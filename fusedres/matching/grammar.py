"""Matches a dataflow expression against the forms that the recipes run.

    block    = Relu(Add(chain, shortcut)) | Relu(Add(shortcut, chain)) | Relu(chain)
    chain    = BN(Conv(X)) | BN(Conv(Relu(chain))) | BN(Conv(chain))
    shortcut = X | BN(Conv(X)) | the output of a submodule called with X, or a sum of several

BN stands for a frozen norm too (`norms.py`). Every parameter stands in the expression once. What does not match has
a reason code.
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from fusedres.blocks.config import Shortcut
from fusedres.matching import dataflow, every_path
from fusedres.matching.dataflow import INPUT, PARAMETER, Dataflow, Node
from fusedres.matching.dry_run import EPS_PROBE, DryRunError, StandIn
from fusedres.matching.labels import check_no_labels
from fusedres.matching.norms import BN, read_norm
from fusedres.matching.owners import NoMatch, Unit, check_called, names
from fusedres.matching.plan import ConvBNNames, Plan
from fusedres.modules import own_code, tree
from fusedres.modules.derived_class import base_class

CONV, RELU, ADD = "Convolution", "Relu", "Add"
ACTIVATIONS = {
    "Sigmoid",
    "Silu",
    "Gelu",
    "Elu",
    "LeakyRelu",
    "Hardtanh",
    "Tanh",
    "Mish",
    "Hardswish",
    "Softplus",
    "Prelu",
}
KNOWN = {CONV, BN, RELU, ADD, INPUT, PARAMETER}
MAX_CONVS = 4  # of a main path
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
COLLECTIONS = ("dict", "list", "tuple", "sequence", "mapping")
KEYED = {"keys", "values", "items"}
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule)


class Form(NamedTuple):
    """A matched expression."""

    main: tuple[Unit, ...]
    shortcut: Shortcut
    projection: Unit | None
    paths: tuple[str, ...]  # of the submodules that make the shortcut


def chain(node: Node | None) -> tuple[Unit, ...] | None:
    """The units of BN(Conv(... BN(Conv(X)))), from input to output, or None."""
    units: list[Unit] = []
    relu = False
    while node is not None and node.op != INPUT:
        if node.op == RELU and units and not relu:
            relu, node = True, node.args[0]
            continue
        norm = read_norm(node)
        if norm is None or len(units) == MAX_CONVS:
            return None
        conv = norm.input
        if conv.op != CONV or conv.attributes["transposed"]:
            return None
        units.append(Unit(conv, norm, relu))
        relu, node = False, conv.args[0]
    return tuple(reversed(units)) if node is not None and not relu else None


def summands(node: Node | None) -> list[Node] | None:
    """The terms of a sum, in order, with a norm as one term; None where a term is scaled or has no gradient.

    The number 0 is no term: it stands for a branch that is switched off.
    """
    if node is None:
        return None
    if node.op != ADD or read_norm(node) is not None:
        return [node]
    if node.attributes["alpha"] != 1:
        return None
    first, second = node.args
    if second is None and node.attributes.get("number") == 0:
        return summands(first)
    terms = summands(first), summands(second)
    return None if terms[0] is None or terms[1] is None else terms[0] + terms[1]


def match(flow: Dataflow) -> Form:
    """The block's form.

    Raises:
        NoMatch: the expression is none of the forms.
    """
    if flow.root.op != RELU:
        raise NoMatch(refusal(flow.root))
    terms = summands(flow.root.args[0])
    if terms is None:
        raise NoMatch(refusal(flow.root))
    chains = [chain(term) for term in terms]
    longest = max(range(len(terms)), key=lambda i: len(chains[i] or ()))
    main = chains[longest]
    if not main:
        raise NoMatch(refusal(flow.root))
    others = [i for i in range(len(terms)) if i != longest]
    if any(shape_of(terms[i], flow) != flow.root.shape for i in range(len(terms))):
        raise NoMatch("not_residual")
    if not others:
        if len(main) < 2:
            raise NoMatch("not_residual")
        return Form(main, Shortcut.NONE, None, ())
    if len(others) == 1 and (found := chains[others[0]]) is not None and len(found) < 2:
        return Form(
            main, Shortcut.PROJECTION if found else Shortcut.IDENTITY, found[0] if found else None, ()
        )
    paths = [flow.calls_on_input.get(id(terms[i])) for i in others]
    if None in paths:
        raise NoMatch("shortcut_not_a_module")
    return Form(main, Shortcut.TENSOR, None, tuple(paths))  # type: ignore[arg-type]


def shape_of(node: Node, flow: Dataflow) -> tuple[int, ...]:
    return flow.input_shape if node.op == INPUT else node.shape


def refusal(root: Node) -> str:
    """The most telling code for an expression that is no block."""
    ops = {node.op for node in root.walk()}
    unknown = ops - KNOWN
    if unknown - ACTIVATIONS:
        return f"unsupported_op:{', '.join(sorted(unknown))}" if joins_paths(root) else "not_residual"
    if unknown:
        return f"activation_not_relu:{', '.join(sorted(unknown))}"
    return "no_final_relu" if root.op == ADD else "not_residual"


def joins_paths(root: Node) -> bool:
    """Whether a sum of two terms that come from the input stands in the expression, or may stand in an operation of
    the user's own: without one it is a decoder, a pyramid or a pooling of branches, and nobody's residual block."""
    nodes = root.walk()
    sums = [node.args for node in nodes if node.op == ADD and None not in node.args]
    own = any(node.op.endswith("Backward") for node in nodes)  # torch's own are numbered
    return own or any(all(comes_from_input(term) for term in terms) for terms in sums)


def comes_from_input(node: Node | None) -> bool:
    return node is not None and any(below.op == INPUT for below in node.walk())


def by_name(form: Form, module: nn.Module, flow: Dataflow) -> tuple:
    """The form without nodes: what both modes must agree on."""
    units = form.main if form.projection is None else (*form.main, form.projection)
    return form.shortcut, form.paths, tuple(names(module, flow, unit) for unit in units)


def check_parameters(flow: Dataflow, named: tuple[ConvBNNames, ...]) -> None:
    """Each module belongs to one unit, and no parameter of a unit stands in the expression a second time."""
    paths = [path for unit in named for path in (unit.conv, unit.bn)]
    if len(set(paths)) != len(paths):
        raise NoMatch("shared_module")
    uses = Counter(
        arg.name for node in flow.root.walk() for arg in node.args if arg is not None and arg.op == PARAMETER
    )
    owned = {name for name in uses if name and name.rpartition(".")[0] in paths}
    if any(uses[name] > 1 for name in owned):
        raise NoMatch("shared_module")


def check_effects(flow: Dataflow, named: tuple[ConvBNNames, ...], paths: tuple[str, ...]) -> None:
    """Each submodule of the shortcut was called once; nothing was written but running statistics and theirs."""
    for path in paths:
        check_called(flow, path)
    own = {f"{unit.bn}.{name}" for unit in named if not unit.frozen for name in RUNNING}
    theirs = tuple(f"{path}." for path in paths)
    if any(name not in own and not name.startswith(theirs) for name in flow.written):
        raise NoMatch("mutates_module")


class Reading:
    """A module in dry runs, on as many channels as its first convolution takes.

    Raises:
        NoMatch: it cannot be read.
    """

    def __init__(self, module: nn.Module) -> None:
        channels = [m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)]
        if not channels:
            raise NoMatch("not_residual")
        self.channels = channels[0]
        try:
            self.stand_in = StandIn(module)
            self.flows = [dataflow.read(self.stand_in, self.channels, training) for training in (True, False)]
        except DryRunError as error:
            raise NoMatch(error.code) from error

    def check(self, named: tuple[ConvBNNames, ...], called: tuple[str, ...] = ()) -> None:
        """Raises NoMatch unless all that the module does is the match: in both modes, at every size, in any mode."""
        for flow in self.flows:
            check_effects(flow, named, called)
        norms = {unit.bn: EPS_PROBE if unit.eps is None else unit.eps for unit in named if unit.frozen}
        try:
            every_path.check_every_path(self.stand_in, self.channels, norms, set(called))
            check_no_labels(self.stand_in, self.channels)
        except DryRunError as error:
            raise NoMatch(error.code) from error


def plan(module: nn.Module) -> Plan:
    """The plan of a residual block.

    Raises:
        NoMatch: the module is none; `code` says why.
    """
    reading = Reading(module)
    flows = reading.flows
    forms = [match(flow) for flow in flows]
    shortcut, paths, named = by_name(forms[0], module, flows[0])
    if by_name(forms[1], module, flows[1]) != (shortcut, paths, named):
        raise NoMatch("mode_dependent")
    check_parameters(flows[0], named)
    reading.check(named, paths)
    main = len(forms[0].main)
    main_names = (*named[: main - 1], named[main - 1]._replace(relu=True))
    projection = named[-1] if shortcut is Shortcut.PROJECTION else None
    found = tree.describe(module)
    return Plan(main_names, shortcut, projection, paths, found, tree.methods(found))


def looks_residual(module: nn.Module) -> bool:
    """Whether the module is worth a dry run, or a line in the report: not a container, a few convolutions."""
    if isinstance(module, CONTAINERS):
        return False
    convs = sum(isinstance(m, nn.Conv2d) for m in module.modules())
    return 2 <= convs <= 2 * MAX_CONVS


def was_meant_as_one(module: nn.Module, code: str) -> bool:
    """Whether a module with a few convolutions, refused with that code, is worth a line in the report.

    One whose forward cannot run takes no image but several tensors, a list or a dictionary, if its signature says so:
    a pyramid, a head, a decoder.
    """
    if not looks_residual(module):
        return False
    return not code.startswith("dry_run_failed") or takes_one_tensor(base_class(module))


def takes_one_tensor(cls: type) -> bool:
    """Whether the signature of its forward is one for a single tensor, and its code asks the input for no keys."""
    forward = own_code.plain_function(own_code.named(cls, "forward"))
    if forward is None:
        return True
    _, *parameters = inspect.signature(forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(required) != 1:
        return not required
    annotated = str(required[0].annotation).lower()
    return (
        not any(kind in annotated for kind in COLLECTIONS) and not own_code.attributes_named(forward) & KEYED
    )
