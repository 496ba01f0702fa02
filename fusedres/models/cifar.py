"""The small ResNet for CIFAR-sized images (He et al. 2015, section 4.2), with projection shortcuts.

    stem: conv3x3 BN act -> three stages of widths 16, 32, 64 -> global average -> linear

Depth 6n+2 with basic blocks (20, 32, 44, 56, 110), 9n+2 with bottlenecks (29, 164).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedres.models.blocks import BasicBlock, Bottleneck, activation_factory, initialize, make_stage

STAGE_WIDTHS = (16, 32, 64)


class CifarResNet(nn.Module):
    """[N, in_channels, H, W] -> [N, num_classes]

    Args:
        block: BasicBlock or Bottleneck.
        depth: layers in all: 6n+2 for basic blocks, 9n+2 for bottlenecks.
        num_classes: width of the output.
        in_channels: channels of the images.
        residual: False gives the plain twin: the same layers without shortcuts.
        activation: "relu" or "sigmoid".
        zero_init_residual: start every block as the identity (gamma = 0 in its last BN).

    Raises:
        ValueError: a depth that is not of that form, or an unknown activation.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depth: int,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        residual: bool = True,
        activation: str = "relu",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        period = 6 if block is BasicBlock else 9
        if depth < period + 2 or (depth - 2) % period:
            raise ValueError(
                f"CifarResNet: depth {depth} with {block.__name__} is not {period}n+2; "
                f"the nearest is {max(1, round((depth - 2) / period)) * period + 2}"
            )
        factory = activation_factory(activation)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.activation = factory()
        cin = 16
        stages: list[nn.Sequential] = []
        for width in STAGE_WIDTHS:
            stride = 2 if stages else 1
            stages.append(make_stage(block, cin, width, (depth - 2) // period, stride, residual, factory))
            cin = width * block.expansion
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(cin, num_classes)
        initialize(self, zero_init_residual)

    def stem(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, 16, H, W]"""
        return self.activation(self.bn1(self.conv1(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def cifar_resnet(depth: int, num_classes: int = 10, **options) -> CifarResNet:
    """The CIFAR ResNet of that depth: bottlenecks for 29 and 164, basic blocks otherwise."""
    block = Bottleneck if depth in (29, 164) else BasicBlock
    return CifarResNet(block, depth, num_classes, **options)
