"""Modules around a ResNet that only look like residual blocks: not listed, and no failure of `strict`."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F
from library_models import TimmResNet, deep
from spellings import InPlaceAdd
from torch import Tensor, nn

import fusedres
from fusedres.errors import UnsupportedModelError


class Pyramid(nn.Module):
    """As torchvision's FPN: a dictionary of features in, one out; unannotated, as some write it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Conv2d(channels, 32, 1) for channels in (64, 128)])
        self.layer = nn.ModuleList([nn.Conv2d(32, 32, 3, padding=1) for _ in range(2)])

    def forward(self, features):
        names, (larger, smaller) = list(features.keys()), features.values()
        last = self.inner[1](smaller)
        lateral = self.inner[0](larger)
        joined = lateral + F.interpolate(last, size=lateral.shape[-2:], mode="nearest")
        return collections.OrderedDict(zip(names, (self.layer[0](joined), self.layer[1](last)), strict=True))


class AnnotatedHead(nn.Module):
    """As torchvision's RPNHead: a list of features in, two lists out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scores, self.boxes = nn.Conv2d(32, 32, 3), nn.Conv2d(32, 3, 1), nn.Conv2d(32, 12, 1)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [F.relu(self.conv(f)) for f in features]
        return [self.scores(h) for h in hidden], [self.boxes(h) for h in hidden]


class PooledBranches(nn.Module):
    """As DeepLab's ASPP: dilated branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(32, 16, 3, padding=r, dilation=r), nn.BatchNorm2d(16), nn.ReLU())
                for r in (1, 2, 4)
            ]
        )
        self.project = nn.Sequential(nn.Conv2d(48, 16, 1), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, x):
        return self.project(torch.cat([branch(x) for branch in self.branches], 1))


class Decoder(nn.Module):
    """As a U-Net's: what comes from below, and what skipped it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(64, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)

    def forward(self, x, skipped):
        x = torch.cat([F.interpolate(x, scale_factor=2), skipped], 1)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class OwnSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        return a + b

    @staticmethod
    def backward(ctx, dy):
        return dy, dy


class JoinsByOwnFunction(InPlaceAdd):
    """A residual block whose addition only its author knows."""

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(OwnSum.apply(y, x))


class NeedsItsSize(InPlaceAdd):
    """A residual block that cannot run on meta tensors."""

    def forward(self, x):
        return super().forward(x) if float(x.sum()) else x


OTHERS = [Pyramid, AnnotatedHead, PooledBranches, Decoder]


@pytest.mark.parametrize("build", OTHERS)
def test_it_is_not_listed(build):
    model = nn.Sequential(InPlaceAdd(), build())
    assert [row.name for row in fusedres.report(model).blocks] == ["0"]
    fusedres.patch(model, strict=True)
    assert [row.matched for row in fusedres.report(model).blocks] == [True]


@pytest.mark.parametrize(
    ("build", "code"),
    [(JoinsByOwnFunction, "unsupported_op:OwnSumBackward"), (NeedsItsSize, "dry_run_failed:RuntimeError")],
)
def test_what_may_be_a_residual_block_is_listed(build, code):
    model = nn.Sequential(InPlaceAdd(), build())
    assert fusedres.report(model).blocks[1].code == code
    with pytest.raises(UnsupportedModelError, match="1 of 2 blocks cannot be patched: 1 "):
        fusedres.patch(model, strict=True)


def test_a_deep_stem_is_called_one_and_is_no_failure():
    model = fusedres.patch(deep(TimmResNet()), recipe="separate", strict=True)
    stem, *blocks = fusedres.report(model).blocks
    assert (stem.name, stem.code) == ("stem", "deep_stem") and all(block.matched for block in blocks)
    model(torch.randn(2, 3, 32, 32))
    assert {block.runs_as for block in fusedres.report(model).matched} == {"separate"}
