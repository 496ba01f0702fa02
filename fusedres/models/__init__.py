"""The reference ResNets, in plain PyTorch, each with its plain twin (`residual=False`).

`create("resnet50")` builds a model by name; `MODELS` lists the names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from fusedres.models.blocks import BasicBlock, Bottleneck
from fusedres.models.cifar import CifarResNet, cifar_resnet
from fusedres.models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152

CIFAR_DEPTHS = (20, 29, 32, 44, 56, 110, 164)

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    **{f"cifar_resnet{depth}": partial(cifar_resnet, depth) for depth in CIFAR_DEPTHS},
}


def create(name: str, **options) -> nn.Module:
    """The model of that name; options go to its constructor.

    Raises:
        ValueError: no model has that name.
    """
    if name not in MODELS:
        raise ValueError(f"fusedres.models: no model {name!r}, choose from {', '.join(MODELS)}")
    return MODELS[name](**options)


__all__ = [
    "MODELS",
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "ResNet",
    "cifar_resnet",
    "create",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]
