"""Models whose stem lies in their own method, as torchvision and timm build them; each goes by the library's name."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision_blocks import TorchvisionBasic


class TorchvisionResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(TorchvisionBasic())
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(32, 5)

    def _forward_impl(self, x: torch.Tensor) -> torch.Tensor:
        """The model, stem first."""
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)

        x = self.layer1(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward_impl(x)


class TimmResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32)
        self.act1, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(TorchvisionBasic())
        self.fc = nn.Linear(32, 5)
        self.grad_checkpointing = False

    def forward_features(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)
        x = self.maxpool(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint(self.layer1, x, use_reentrant=False)
        else:
            x = self.layer1(x)
        return x

    def forward_head(self, x):
        return self.fc(x.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


for cls, module in ((TorchvisionResNet, "torchvision.models.resnet"), (TimmResNet, "timm.models.resnet")):
    cls.__module__, cls.__qualname__, cls.__name__ = module, "ResNet", "ResNet"


class Inherits(TorchvisionResNet):
    """A subclass that leaves the method as it is."""

    def forward(self, x):
        return self._forward_impl(x) * 2


class ReadsAPartLater(TorchvisionResNet):
    def _forward_impl(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        return self.fc(self.relu(self.layer1(x)).mean((2, 3)))


class HandsItselfOn(TorchvisionResNet):
    def _forward_impl(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        return self.fc(getattr(self, "layer1")(x).mean((2, 3)))  # noqa: B009


class StoresSomething(TorchvisionResNet):
    def _forward_impl(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        self.features = self.layer1(x)
        return self.fc(self.features.mean((2, 3)))


class PoolsBeforeReLU(TorchvisionResNet):
    def _forward_impl(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.maxpool(x)
        x = self.relu(x)
        return self.fc(self.layer1(x).mean((2, 3)))


class KeepsTheImage(TorchvisionResNet):
    def _forward_impl(self, x):
        image = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        return self.fc(self.layer1(x).mean((2, 3))) + image.mean()


class TakesAnOption(TorchvisionResNet):
    def _forward_impl(self, x, scale=1.0):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        return self.fc(self.layer1(x).mean((2, 3))) * scale


class Decorated(TorchvisionResNet):
    @torch.no_grad()
    def _forward_impl(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        return self.fc(self.layer1(x).mean((2, 3)))


class WithoutSource(TorchvisionResNet):
    pass


SOURCE = """
def _forward_impl(self, x):
    x = self.conv1(x)
    x = self.bn1(x)
    x = self.relu(x)
    x = self.maxpool(x)
    return self.fc(self.layer1(x).mean((2, 3)))
"""
made: dict = {}
exec(SOURCE, made)
WithoutSource._forward_impl = made["_forward_impl"]

DIFFERENT_STEMS = [
    ReadsAPartLater,
    HandsItselfOn,
    StoresSomething,
    PoolsBeforeReLU,
    KeepsTheImage,
    TakesAnOption,
    Decorated,
    WithoutSource,
]


def deep(model: nn.Module) -> nn.Module:
    """The model with the stem of ResNet-C and -D."""
    units = [(3, 32, 2), (32, 32, 1), (32, 32, 1)]
    convs = [nn.Conv2d(cin, cout, 3, stride, 1, bias=False) for cin, cout, stride in units]
    between = [layer for conv in convs[:2] for layer in (conv, nn.BatchNorm2d(32), nn.ReLU())]
    model.conv1 = nn.Sequential(*between, convs[2])
    return model
