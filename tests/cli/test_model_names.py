"""Models by name: what each name builds, and what a wrong or unavailable one says."""

from __future__ import annotations

import functools
import socket
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from fusedres.cli import model_names
from fusedres.cli.model_names import ModelNameError
from fusedres.models import CifarResNet


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_own_models():
    assert isinstance(model_names.build("fusedres:cifar_resnet20"), CifarResNet)
    assert model_names.image_size("fusedres:cifar_resnet20") == 32
    assert model_names.image_size("hf:resnet-50") == 224


@pytest.mark.parametrize("name", ["resnet-18", "resnet-50", "microsoft/resnet-50"])
def test_transformers_models_are_those_of_their_names(name):
    """The same number of parameters as the same depth here, apart from nothing: both have 1000 classes or 2."""
    found = model_names.build(f"hf:{name}")
    own = model_names.build("fusedres:resnet" + name.rpartition("-")[2])
    head = found.classifier[1]
    difference = (1000 - head.out_features) * (head.in_features + 1)
    assert parameters(own) - parameters(found) == difference


def standin(name: str, **members: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


FETCHED = "the default of torchvision's own builders: weights to fetch"


def fetching(weights: object, weights_backbone: object = None) -> nn.Module:
    assert weights is None and weights_backbone is None, "it would reach for the network"
    return nn.Linear(1, 1)


def legacy(builder):
    """As torchvision wraps its builders to take the arguments of older versions."""

    @functools.wraps(builder)
    def inner(*args, **options):
        return builder(*args, **options)

    return inner


@legacy
def resnet50(*, weights=None, progress=True, **options):
    assert not options, f"ResNet takes no {options}"
    return fetching(weights)


@legacy
def fcn_resnet50(*, weights=None, progress=True, aux_loss=None, weights_backbone=FETCHED, **options):
    return fetching(weights, weights_backbone)


@legacy
def fasterrcnn_resnet50_fpn(*, weights=FETCHED, progress=True, weights_backbone=FETCHED, **options):
    return fetching(weights, weights_backbone)


REGISTRY = {builder.__name__: builder for builder in (resnet50, fcn_resnet50, fasterrcnn_resnet50_fpn)}


def get_model_builder(name: str):
    """As torchvision looks up a builder."""
    if name.lower() not in REGISTRY:
        raise ValueError(f"Unknown model {name.lower()}")
    return REGISTRY[name.lower()]


@pytest.fixture
def torchvision(monkeypatch):
    models = standin("torchvision.models", get_model_builder=get_model_builder)
    monkeypatch.setitem(sys.modules, "torchvision", standin("torchvision", models=models))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


@pytest.mark.parametrize("name", REGISTRY)
def test_torchvision_builds_from_nothing_that_is_fetched(torchvision, name):
    assert model_names.build(f"torchvision:{name}").training


def test_an_unknown_name_of_torchvision_is_an_error_of_the_name(torchvision):
    with pytest.raises(ModelNameError, match="Unknown model resnet51"):
        model_names.build("torchvision:resnet51")


def test_timm_is_asked_for_random_weights_and_for_no_hub(monkeypatch):
    asked = []

    def create_model(name, **options):
        asked.append((name, options))
        return nn.Linear(1, 1)

    monkeypatch.setitem(sys.modules, "timm", standin("timm", create_model=create_model))
    model_names.build("timm:resnet50d.ra2_in1k")
    for name in ("hf-hub:timm/resnet50", "hf_hub:timm/resnet50", "local-dir:/tmp/model"):
        with pytest.raises(ModelNameError, match=r"would be fetched; needed a name of timm's own"):
            model_names.build(f"timm:{name}")
    assert asked == [("resnet50d.ra2_in1k", {"pretrained": False})]


def test_transformers_models_reach_for_no_network(monkeypatch):
    def reached(*arguments, **options):
        raise AssertionError("it reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", reached)
    monkeypatch.setattr(socket.socket, "connect", reached)
    for name in ("hf:resnet-18", "hf:microsoft/resnet-18"):
        assert model_names.build(name).training


def test_an_unknown_name_of_a_library_is_an_error_of_the_name(monkeypatch):
    def unknown(name, **options):
        raise RuntimeError(f"Unknown model ({name})")

    monkeypatch.setitem(sys.modules, "timm", standin("timm", create_model=unknown))
    with pytest.raises(ModelNameError, match=r"timm: Unknown model \(x\)"):
        model_names.build("timm:x")
    with pytest.raises(ModelNameError, match="choose from resnet, resnet-18"):
        model_names.build("hf:resnet-19")
    with pytest.raises(ModelNameError, match="choose from"):
        model_names.build("fusedres:resnet51")


@pytest.mark.parametrize("name", ["resnet50", "other:resnet50", ""])
def test_a_name_without_a_library_shows_the_form(name):
    with pytest.raises(ModelNameError, match="fusedres:, hf:, torchvision:, timm:"):
        model_names.build(name)


def finder(error: Exception):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] == "timm":
                raise error

    return Finder


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("no", name="timm"), "timm is not installed: pip install timm"),
        (
            ModuleNotFoundError("no", name="yaml"),
            r"yaml \(which timm needs\) is not installed: pip install yaml",
        ),
        (
            RuntimeError("operator does not exist"),
            rf"beside torch {torch.__version__.partition('+')[0]}.*operator",
        ),
    ],
    ids=["missing", "needs", "broken"],
)
def test_a_missing_or_broken_library_names_the_command(monkeypatch, error, message):
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [finder(error), *sys.meta_path])
    with pytest.raises(ModelNameError, match=message):
        model_names.build("timm:resnet50")


def test_images_are_the_same_in_every_run():
    first = model_names.images(2, 8)
    assert first.shape == (2, 3, 8, 8) and torch.equal(first, model_names.images(2, 8))
