"""The reference ResNet for ImageNet-sized images, in plain PyTorch, with torchvision's state_dict keys.

stem: conv7x7/2 BN act maxpool3x3/2 -> four stages of residual blocks -> global average -> linear
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedres.models.blocks import BasicBlock, Bottleneck, activation_factory, initialize, make_stage

STAGE_WIDTHS = (64, 128, 256, 512)


class ResNet(nn.Module):
    """ResNet v1.5. [N, 3, H, W] -> [N, num_classes]

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks in each of the four stages.
        num_classes: width of the output.
        residual: False gives the plain twin: the same layers without shortcuts.
        activation: "relu" or "sigmoid".
        zero_init_residual: start every block as the identity (gamma = 0 in its last BN).

    Raises:
        ValueError: unknown activation.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        *,
        residual: bool = True,
        activation: str = "relu",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        factory = activation_factory(activation)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.activation = factory()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        cin = 64
        stages: list[nn.Sequential] = []
        for width, depth in zip(STAGE_WIDTHS, depths, strict=True):
            stride = 2 if stages else 1
            stages.append(make_stage(block, cin, width, depth, stride, residual, factory))
            cin = width * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(cin, num_classes)
        initialize(self, zero_init_residual)

    def stem(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 64, H/4, W/4]"""
        return self.maxpool(self.activation(self.bn1(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(num_classes: int = 1000, **options) -> ResNet:
    """18 layers of basic blocks; options as in `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)


def resnet34(num_classes: int = 1000, **options) -> ResNet:
    """34 layers of basic blocks; options as in `ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, **options)


def resnet50(num_classes: int = 1000, **options) -> ResNet:
    """50 layers of bottlenecks; options as in `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **options)


def resnet101(num_classes: int = 1000, **options) -> ResNet:
    """101 layers of bottlenecks; options as in `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, **options)


def resnet152(num_classes: int = 1000, **options) -> ResNet:
    """152 layers of bottlenecks; options as in `ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, **options)
