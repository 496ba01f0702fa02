"""Stems, `[maxpool](relu(BN(conv(x))))`: matched by dataflow where a module computes nothing else.

Where a stem lies in a model's own method, nothing is guessed: the class is listed here by its name, the method must
begin with the stem (`stem_source.py`), and its parts must be torch's own.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fusedres.blocks.config import Shortcut, Window
from fusedres.matching.dataflow import Dataflow
from fusedres.matching.grammar import CONTAINERS, RELU, Reading, chain, refusal
from fusedres.matching.owners import NoMatch, geometry, names
from fusedres.matching.plan import ConvBNNames, Plan
from fusedres.matching.stem_reach import reaches
from fusedres.matching.stem_source import begins_with
from fusedres.modules import own_code, shadows, tree
from fusedres.modules.lazy import is_uninitialised
from fusedres.nn.numbers import UnusualNumberError, pair, square_window

MAX_POOL = "MaxPool2DWithIndices"


class StemForm(NamedTuple):
    """Which method of a class computes its stem, from which submodules; `goes_on`: with the model after it."""

    method: str
    conv: str
    bn: str
    activation: str
    pool: str | None
    goes_on: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """In the order in which they run."""
        return tuple(path for path in (self.conv, self.bn, self.activation, self.pool) if path is not None)


STEMS: dict[str, StemForm] = {
    "fusedres.models.resnet.ResNet": StemForm("stem", "conv1", "bn1", "activation", "maxpool", False),
    "fusedres.models.cifar.CifarResNet": StemForm("stem", "conv1", "bn1", "activation", None, False),
    "torchvision.models.resnet.ResNet": StemForm("_forward_impl", "conv1", "bn1", "relu", "maxpool", True),
    "timm.models.resnet.ResNet": StemForm("forward_features", "conv1", "bn1", "act1", "maxpool", True),
}


def listed(base: type) -> tuple[type, StemForm] | None:
    """The class among `base` and its bases that the list names, and its form."""
    for cls in base.__mro__:
        form = STEMS.get(f"{cls.__module__}.{cls.__qualname__}")
        if form is not None:
            return cls, form
    return None


def has_stem(base: type) -> bool:
    return listed(base) is not None


def plan_stem(model: nn.Module, base: type) -> Plan:
    """The plan of a listed model's stem; `base` is its class as the user knows it.

    Raises:
        NoMatch: its method is another or its forward does not come to it, its parts are not torch's own or not
            initialised, or a method was set on the instance.
    """
    found = listed(base)
    assert found is not None
    cls, form = found
    if form.method in vars(model) or ("forward" in vars(model) and not shadows.is_own_forward(model)):
        raise NoMatch("instance_forward")
    if own_code.reads_own_class(base):
        raise NoMatch("asks_own_class")
    method = getattr(base, form.method, None)
    known = begins_with(method, form.parts) if form.goes_on else method is getattr(cls, form.method)
    if not known:
        raise NoMatch("stem_differs")
    if not reaches(base, form.method):
        raise NoMatch("stem_not_called")
    parts = [getattr(model, path, None) for path in form.parts]
    if any(isinstance(part, nn.Module) and is_uninitialised(part) for part in parts):
        raise NoMatch("uninitialised")
    expected = {form.conv: nn.Conv2d, form.bn: nn.BatchNorm2d}
    if form.pool is not None:
        expected[form.pool] = nn.MaxPool2d
    if isinstance(part := getattr(model, form.conv, None), nn.Sequential) and len(part) > 1:
        raise NoMatch("deep_stem")
    for path, part in expected.items():
        if type(getattr(model, path, None)) is not part:
            raise NoMatch(f"unsupported_module:{type(getattr(model, path, None)).__name__}")
    if type(getattr(model, form.activation, None)) is not nn.ReLU:
        raise NoMatch("activation_not_relu")
    if form.pool is not None:
        check_pool(model.get_submodule(form.pool))  # type: ignore[arg-type]
    conv = model.get_submodule(form.conv)
    unit = ConvBNNames(form.conv, form.bn, True, geometry(conv))  # type: ignore[arg-type]
    described = tuple(tree.describe_module(path, model.get_submodule(path)) for path in form.parts)
    for path in form.parts:
        if (name := shadows.shadowing(model.get_submodule(path))) is not None:
            raise NoMatch(f"instance_shadows:{path}.{name}")
    return stem_plan(unit, form.pool, described)._replace(method=form.method, goes_on=form.goes_on)


def stem_plan(unit: ConvBNNames, pool: str | Window | None, structure: tuple[tree.Submodule, ...]) -> Plan:
    return Plan((unit,), Shortcut.NONE, None, (), structure, tree.methods(structure), pool)


def check_pool(pool: nn.MaxPool2d) -> Window:
    """The pooling's window. Raises NoMatch where it is none that is served."""
    try:
        window = square_window(pool)
    except UnusualNumberError as error:
        raise NoMatch(error.code) from error
    if window is None:
        raise NoMatch("unsupported_module:MaxPool2d")
    return window


def looks_like_stem(module: nn.Module) -> bool:
    """Whether the module is worth a dry run: one convolution, and something around it."""
    if isinstance(module, (*CONTAINERS, nn.Conv2d)):
        return False
    return sum(isinstance(m, nn.Conv2d) for m in module.modules()) == 1


def was_meant_as_one(module: nn.Module, code: str) -> bool:
    """Whether a module with one convolution, refused with that code, is worth a line in the report.

    Few are stems: only another activation says so, or, where nothing could be read yet, a pooling.
    """
    if code == "uninitialised":
        return any(isinstance(m, nn.MaxPool2d) for m in module.modules())
    return code.startswith("activation_not_relu")


def match_stem(module: nn.Module, flow: Dataflow) -> tuple[ConvBNNames, str | Window]:
    """The convolution with its BN, and the pooling: by its path, or by its numbers where no module does it."""
    root = flow.root
    if root.op != MAX_POOL or root.args[0] is None:
        raise NoMatch("not_residual")
    relu = root.args[0]
    units = chain(relu.args[0]) if relu.op == RELU else None
    if not units or len(units) > 1:
        raise NoMatch(refusal(relu))
    path = flow.calls.get(id(root))
    if path is not None and type(module.get_submodule(path)) is nn.MaxPool2d:
        check_pool(module.get_submodule(path))  # type: ignore[arg-type]
        pool: str | Window = path
    elif path is not None and isinstance(module.get_submodule(path), nn.MaxPool2d):
        raise NoMatch(f"unsupported_module:{type(module.get_submodule(path)).__name__}")
    else:
        numbers = root.attributes
        if pair(numbers["dilation"], "dilation") != (1, 1) or numbers["ceil_mode"]:
            raise NoMatch("unsupported_op:max_pool2d")
        pool = check_pool(nn.MaxPool2d(*(numbers[name] for name in Window._fields)))
    return names(module, flow, units[0])._replace(relu=True), pool


def plan_stem_module(module: nn.Module) -> Plan:
    """The plan of a module that is a stem.

    Raises:
        NoMatch: it is none; `code` says why.
    """
    reading = Reading(module)
    found = {match_stem(module, flow) for flow in reading.flows}
    if len(found) > 1:
        raise NoMatch("mode_dependent")
    unit, pool = found.pop()
    reading.check((unit,))
    return stem_plan(unit, pool, tree.describe(module))
