"""Stems whose method nobody calls: the report says so."""

from __future__ import annotations

import functools

import pytest
import torch
from library_models import TimmResNet, TorchvisionResNet
from torch import nn

import fusedres
from fusedres.models import resnet18


class Encoder(TorchvisionResNet):
    """segmentation_models' encoder: features of every stage."""

    def __init__(self) -> None:
        super().__init__()
        del self.fc, self.avgpool

    def forward(self, x):
        features = [x]
        x = self.relu(self.bn1(self.conv1(x)))
        features.append(x)
        features.append(self.layer1(self.maxpool(x)))
        return features


class StagesEncoder(Encoder):
    """An older spelling of it."""

    def get_stages(self):
        return [
            nn.Identity(),
            nn.Sequential(self.conv1, self.bn1, self.relu),
            nn.Sequential(self.maxpool, self.layer1),
        ]

    def forward(self, x):
        features = []
        for stage in self.get_stages():
            x = stage(x)
            features.append(x)
        return features


class TimmEncoder(TimmResNet):
    @torch.no_grad()
    def forward(self, x):
        return self.layer1(self.maxpool(self.act1(self.bn1(self.conv1(x)))))


class OurEncoder(type(resnet18(num_classes=3))):
    def forward(self, x):
        return self.layer1(self.maxpool(self.activation(self.bn1(self.conv1(x)))))


class ThroughSuper(TorchvisionResNet):
    def forward(self, x):
        return super().forward(x) * 2


class ThroughAMethod(TimmResNet):
    def features(self, x):
        return getattr(self, "forward_features")(x)  # noqa: B009

    def forward(self, x):
        return self.features(x)


def doubled(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return function(self, x) * 2

    return wrapper


class ThroughADecorator(TimmResNet):
    @doubled
    def forward(self, x):
        return self.forward_features(x)


def stem_row(model: nn.Module):
    return next(row for row in fusedres.report(model).blocks if row.name == "stem")


def our_encoder() -> nn.Module:
    model = resnet18(num_classes=3)
    model.__class__ = OurEncoder
    return model


@pytest.mark.parametrize("build", [Encoder, StagesEncoder, TimmEncoder, our_encoder])
def test_a_forward_that_passes_the_method_by(build):
    model = fusedres.patch(build(), recipe="separate")
    model(torch.randn(2, 3, 33, 33))
    row = stem_row(model)
    assert (row.matched, row.code) == (False, "stem_not_called")
    assert fusedres.report(model).matched[0].runs_as == "separate"


@pytest.mark.parametrize("build", [ThroughSuper, ThroughAMethod, ThroughADecorator])
def test_a_forward_that_comes_to_the_method(build):
    model = fusedres.patch(build(), recipe="separate", strict=True)
    model(torch.randn(2, 3, 33, 33))
    assert stem_row(model).runs_as == "separate"


def intermediates(model, x):
    """timm's forward_intermediates: the stem's modules, then the stages."""
    return model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x)))))


def test_a_caller_that_passes_the_method_by():
    model = fusedres.patch(TimmResNet(), recipe="separate", strict=True)
    assert stem_row(model).code is None  # nothing has been called
    intermediates(model, torch.randn(2, 3, 33, 33))
    row = stem_row(model)
    assert (row.matched, row.runs_as, row.code) == (True, None, "stem_not_called")
    assert "stem_not_called" in str(fusedres.report(model))
    model(torch.randn(2, 3, 33, 33))
    row = stem_row(model)
    assert (row.runs_as, row.code) == ("separate", None)


def test_a_stem_beside_another_model_that_ran():
    both = fusedres.patch(nn.ModuleDict({"a": TimmResNet(), "b": TimmResNet()}), recipe="separate")
    both["a"](torch.randn(2, 3, 33, 33))
    rows = {row.name: row.code for row in fusedres.report(both).blocks}
    assert rows["a.stem"] is None and rows["b.stem"] is None
