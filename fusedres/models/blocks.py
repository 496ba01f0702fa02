"""The two residual blocks of He et al. 2015 (arXiv:1512.03385), and their plain twins without the shortcut.

    BasicBlock   x -> conv3x3 BN act -> conv3x3 BN        -> (+ shortcut(x)) -> act
    Bottleneck   x -> conv1x1 BN act -> conv3x3 BN act -> conv1x1 BN -> (+ shortcut(x)) -> act

The stride sits on the 3x3 convolution (v1.5). Names follow torchvision, so checkpoints load both ways.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

ActivationFactory = Callable[[], nn.Module]


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


ACTIVATIONS: dict[str, ActivationFactory] = {"relu": relu, "sigmoid": nn.Sigmoid}


def conv3x3(cin: int, cout: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 3, stride, 1, groups=groups, bias=False)


def conv1x1(cin: int, cout: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. [N, cin, H, W] -> [N, width, H/stride, W/stride]"""

    expansion = 1

    def __init__(
        self,
        cin: int,
        width: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        residual: bool = True,
        activation: ActivationFactory = relu,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(cin, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.activation = activation()
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.residual:
            out += x if self.downsample is None else self.downsample(x)
        return self.activation(out)


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand. [N, cin, H, W] -> [N, 4*width, H/stride, W/stride]"""

    expansion = 4

    def __init__(
        self,
        cin: int,
        width: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        residual: bool = True,
        activation: ActivationFactory = relu,
    ) -> None:
        super().__init__()
        self.conv1 = conv1x1(cin, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, width * self.expansion)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.activation = activation()
        self.downsample = downsample
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.activation(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.residual:
            out += x if self.downsample is None else self.downsample(x)
        return self.activation(out)


def make_stage(
    block: type[BasicBlock] | type[Bottleneck],
    cin: int,
    width: int,
    depth: int,
    stride: int,
    residual: bool,
    activation: ActivationFactory,
) -> nn.Sequential:
    """`depth` blocks, the first with `stride` and, where shapes change, a projection shortcut."""
    cout = width * block.expansion
    downsample = None
    if residual and (stride != 1 or cin != cout):
        downsample = nn.Sequential(conv1x1(cin, cout, stride), nn.BatchNorm2d(cout))
    first = block(cin, width, stride, downsample, residual, activation)
    rest = [block(cout, width, 1, None, residual, activation) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)


def initialize(model: nn.Module, zero_init_residual: bool) -> None:
    """He initialisation of the convolutions; optionally gamma = 0 in each block's last BN, so that it starts as
    the identity (Goyal et al. 2017, arXiv:1706.02677)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            nn.init.zeros_(last.weight)


def activation_factory(name: str) -> ActivationFactory:
    if name not in ACTIVATIONS:
        raise ValueError(
            f"fusedres.models: activation {name!r} is unknown, choose from {sorted(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]
