"""Stems, `[maxpool](relu(BN(conv(x))))`: they lie in a model's own methods, so exact classes are listed, not guessed.

A stem is fused where the model's class is one of these, its method is untouched, and its parts are torch's own.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fusedres.models import CifarResNet, ResNet
from fusedres.nn.stem import unsuitable_pool
from fusedres.patching.grammar import NoMatch, geometry
from fusedres.patching.plan import ConvBNNames, StemPlan


class StemForm(NamedTuple):
    """Which method of a class computes its stem, from which submodules."""

    method: str
    conv: str
    bn: str
    activation: str
    pool: str | None


STEMS: dict[type[nn.Module], StemForm] = {
    ResNet: StemForm("stem", "conv1", "bn1", "activation", "maxpool"),
    CifarResNet: StemForm("stem", "conv1", "bn1", "activation", None),
}


def has_stem(base: type[nn.Module]) -> bool:
    return base in STEMS


def plan_stem(model: nn.Module, base: type[nn.Module]) -> StemPlan:
    """The plan of a model's stem; `base` is its class as the user knows it.

    Raises:
        NoMatch: its parts are not torch's own, or a method was set on the instance.
    """
    form = STEMS[base]
    if form.method in vars(model) or "forward" in vars(model):
        raise NoMatch("instance_forward")
    expected = {form.conv: nn.Conv2d, form.bn: nn.BatchNorm2d}
    if form.pool is not None:
        expected[form.pool] = nn.MaxPool2d
    for path, cls in expected.items():
        if type(getattr(model, path, None)) is not cls:
            raise NoMatch(f"unsupported_module:{type(getattr(model, path, None)).__name__}")
    if type(getattr(model, form.activation, None)) is not nn.ReLU:
        raise NoMatch("activation_not_relu")
    if form.pool is not None and unsuitable_pool(model.get_submodule(form.pool)):  # type: ignore[arg-type]
        raise NoMatch("unsupported_module:MaxPool2d")
    conv = model.get_submodule(form.conv)
    names = ConvBNNames(form.conv, form.bn, True, geometry(conv))  # type: ignore[arg-type]
    paths = [path for path in form[1:] if path is not None]
    return StemPlan(form.method, names, form.pool, tuple((p, type(model.get_submodule(p))) for p in paths))
