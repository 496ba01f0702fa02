"""Models by name, for the command line: `fusedres:resnet50`, `hf:resnet-50`, `torchvision:resnet50`, `timm:resnet50`.

All have random weights; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import nn

from fusedres import models

DEPTHS = {"18": (2, 2, 2, 2), "26": (2, 2, 2, 2), "34": (3, 4, 6, 3), "50": (3, 4, 6, 3)}
DEPTHS |= {"101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}
BASIC = ("18", "34")
BACKBONE = "weights_backbone"  # the argument of torchvision's builders
CONFIGS: dict[str, dict[str, Any]] = {
    "resnet": {},  # transformers' own default
    **{
        f"resnet-{depth}": {
            "layer_type": "basic" if depth in BASIC else "bottleneck",
            "depths": list(blocks),
            "hidden_sizes": [64, 128, 256, 512] if depth in BASIC else [256, 512, 1024, 2048],
        }
        for depth, blocks in DEPTHS.items()
    },
}


class ModelNameError(ValueError):
    """A name that stands for no model, or for one of a library that does not import."""


def library(name: str) -> Any:
    """The library, or a module of it, imported.

    Raises:
        ModelNameError: it is not installed, or does not import beside this torch.
    """
    package = name.partition(".")[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or package
        needs = "" if missing == package else f" (which {package} needs)"
        raise ModelNameError(f"{missing}{needs} is not installed: pip install {missing}") from error
    except (ImportError, RuntimeError, AttributeError) as error:
        raise ModelNameError(
            f"{package} does not import beside torch {torch.__version__} ({error}): "
            f"pip install the {package} that belongs to this torch"
        ) from error


def own_model(name: str) -> nn.Module:
    return models.create(name)


def transformers_model(name: str) -> nn.Module:
    name = name.removeprefix("microsoft/")
    if name not in CONFIGS:
        raise ValueError(f"hf has no model {name!r} here, choose from {', '.join(CONFIGS)}")
    transformers = library("transformers")
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**CONFIGS[name]))


def torchvision_model(name: str) -> nn.Module:
    builder = library("torchvision.models").get_model_builder(name)
    options = {"weights": None}
    # detection and segmentation models would fetch weights for their backbone; others take no such argument
    if BACKBONE in signature(builder).parameters:
        options[BACKBONE] = None
    return builder(**options)


def timm_model(name: str) -> nn.Module:
    if ":" in name or name.startswith("hf_hub"):
        raise ValueError(
            f"timm:{name} names a model of a hub, whose configuration would be fetched; needed a name of timm's "
            "own, which nothing is fetched for: for example timm:resnet50"
        )
    try:
        return library("timm").create_model(name, pretrained=False)
    except RuntimeError as error:
        raise ValueError(f"timm: {error}") from error


BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "fusedres": own_model,
    "hf": transformers_model,
    "torchvision": torchvision_model,
    "timm": timm_model,
}


def build(name: str) -> nn.Module:
    """The model that `LIBRARY:NAME` stands for, in training mode.

    Raises:
        ModelNameError: it stands for none, or its library does not import; the message says what to do.
    """
    prefix, colon, model = name.partition(":")
    if not colon or prefix not in BUILDERS:
        prefixes = ", ".join(f"{known}:" for known in BUILDERS)
        raise ModelNameError(
            f"{name!r} is no known model: write LIBRARY:NAME with one of {prefixes} for example fusedres:resnet50"
        )
    try:
        return BUILDERS[prefix](model).train()
    except ModelNameError:
        raise
    except ValueError as error:
        raise ModelNameError(str(error)) from error


def image_size(name: str) -> int:
    """Height and width of the images that the model of that name is made for."""
    return 32 if "cifar" in name else 224


def images(batch: int, size: int) -> torch.Tensor:
    """Random images [batch, 3, size, size], the same in every run."""
    return torch.randn((batch, 3, size, size), generator=torch.Generator().manual_seed(0))
