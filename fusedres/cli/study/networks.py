"""The networks under study: the CIFAR ResNet, its plain twin, and both with sigmoid or without BN; patched.

plain      y = act(F(x))
residual   y = act(F(x) + x)     He et al. 2015: the blocks that this package fuses
sum        y = F(x) + x          no activation after the addition: the sum of the argument, exactly
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusedres.cli.study.data import Images
from fusedres.errors import VerificationError
from fusedres.models import BasicBlock, CifarResNet
from fusedres.patching import api

RECIPE = "separate"
FORMS = ("plain", "residual", "sum")


@dataclass(frozen=True)
class Kind:
    """One kind of network. start: "he", or "torch" for the initialisation that torch's layers have by default."""

    form: str = "residual"
    activation: str = "relu"
    norm: bool = True
    start: str = "he"

    @property
    def name(self) -> str:
        parts = [self.form, "ReLU" if self.activation == "relu" else self.activation]
        parts.append("BN" if self.norm else "no BN")
        return ", ".join([*parts, *(["torch's start"] if self.start == "torch" else [])])

    @property
    def fuses(self) -> bool:
        """Whether its residual blocks are of a form that `patch` serves."""
        return self.norm and self.activation == "relu" and self.form != "sum"


PLAIN, RESIDUAL = Kind("plain"), Kind("residual")
PLAIN_NO_BN = Kind("plain", norm=False)


class SumBlock(BasicBlock):
    """A BasicBlock without the last activation. [N, cin, H, W] -> [N, width, H/stride, W/stride]"""

    def forward(self, x: Tensor) -> Tensor:
        return main_path(self, x) + shortcut(self, x)


def main_path(block: nn.Module, x: Tensor) -> Tensor:
    """F(x): two convolutions, with all between them and without addition or last activation."""
    out = block.bn1(block.conv1(x))  # type: ignore[operator]
    return block.bn2(block.conv2(block.activation(out)))  # type: ignore[operator]


def shortcut(block: nn.Module, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)  # type: ignore[operator]


def without_norms(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())


def build(kind: Kind, depth: int, channels: int, classes: int, seed: int) -> nn.Module:
    """The unpatched network, its weights drawn from the seed; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        residual = kind.form != "plain"
        model: nn.Module = CifarResNet(
            BasicBlock, depth, classes, in_channels=channels, residual=residual, activation=kind.activation
        )
        if kind.start == "torch":
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # as nn.Conv2d does by itself
    if kind.form == "sum":
        for block in blocks(model):
            block.__class__ = SumBlock
    if not kind.norm:
        without_norms(model)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The residual blocks, or their plain twins, in order."""
    return [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]  # type: ignore[union-attr]


def run(model: nn.Module, images: Tensor, through: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
    """[N, C, H, W] -> [N, classes], through those blocks in place of the model's own."""
    x = model.stem(images)  # type: ignore[operator]
    for block in through:
        x = block(x)
    return model.fc(torch.flatten(model.avgpool(x), 1))  # type: ignore[operator]


def patched(model: nn.Module, kind: Kind) -> nn.Module:
    """The same model, with the recipe forced where blocks have a form that is served."""
    return api.patch(model, recipe=RECIPE, strict=True) if kind.fuses else model


def small(images: Images, kind: Kind, depth: int, is_patched: bool) -> nn.Module:
    """A fresh network for the comparison of a study, patched and unpatched."""
    model = build(kind, depth, images.channels, len(images.classes), 0)
    return patched(model, kind) if is_patched else model


def check_ran(model: nn.Module, kind: Kind) -> None:
    """After a call of a patched network: every block ran as the recipe that was asked for.

    Raises:
        VerificationError: one did not.
    """
    if not kind.fuses:
        return
    report = api.report(model)
    wrong = [row for row in report.blocks if row.runs_as != RECIPE]
    if wrong or len(report.matched) < len(blocks(model)):
        raise VerificationError(
            f"fusedres study: the blocks of the {kind.name} network have to run as {RECIPE}, of "
            f"{len(report.blocks)} found {len(wrong)} did not; `fusedres doctor` tests the installation\n{report}"
        )
