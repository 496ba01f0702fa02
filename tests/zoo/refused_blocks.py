"""Blocks that are left alone, each for a reason that no other zoo has, and blocks that only some calls refuse."""

from __future__ import annotations

import torch
from block_forms import projection
from frozen_norms import FrozenNorm
from spellings import InPlaceAdd
from torch import Tensor, nn
from torchvision_blocks import TorchvisionBasic

from fusedres.models import BasicBlock
from fusedres.models.resnet import ResNet


class GivesFloat64(InPlaceAdd):
    def forward(self, x):
        return super().forward(x).double()


class Reformats(InPlaceAdd):
    def forward(self, x):
        return super().forward(x if x.is_contiguous() else x.contiguous())


class AsksDevice(InPlaceAdd):
    def forward(self, x):
        return super().forward(x.to(x.device))


class EntersState(InPlaceAdd):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class AsksOwnClass(InPlaceAdd):
    def forward(self, x):
        return super().forward(x) if type(self) is AsksOwnClass else x


class Resists(InPlaceAdd):
    @property
    def __class__(self):
        return InPlaceAdd


class ChecksInput(InPlaceAdd):
    def forward(self, x):
        if x.shape[-1] != 32:
            raise ValueError("not 32 wide")
        return super().forward(x)


class Fails(InPlaceAdd):
    def forward(self, x):
        raise KeyError("always")


class Labelled(InPlaceAdd):
    def forward(self, x):
        with torch.profiler.record_function("a label"):
            return super().forward(x)


class Unregistered(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x)


class PassesStemBy(ResNet):
    def forward(self, x):
        return self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))


class OwnTensor(Tensor):
    pass


def with_forward() -> nn.Module:
    block = InPlaceAdd()
    block.forward = lambda x: x
    return block


def with_shadow() -> nn.Module:
    block = InPlaceAdd()
    vars(block.conv1)["_conv_forward"] = lambda *args: args[0]
    return block


def lazy() -> nn.Module:
    block = InPlaceAdd()
    block.conv1 = nn.LazyConv2d(16, 3, padding=1)
    return block


def subclassed_norm() -> nn.Module:
    block = InPlaceAdd()
    block.bn2 = Unregistered(16)
    return block


def scripted() -> nn.Module:
    block = InPlaceAdd()
    block.relu = torch.jit.script(nn.ReLU())
    return block


def frozen() -> nn.Module:
    return TorchvisionBasic(norm=FrozenNorm)


def projected() -> nn.Module:
    return BasicBlock(16, 32, downsample=projection(16, 32))
