"""Residual blocks built as torchvision, timm and fastai build them: their structure and operations, in our words."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

CIN = 32  # channels of the input of every block
NormFactory = Callable[[int], nn.Module]


class TorchvisionBasic(nn.Module):
    """One shared in-place ReLU, an in-place addition, downsample or None."""

    def __init__(self, cin=CIN, width=CIN, stride=1, downsample=None, norm: NormFactory = nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 3, stride, 1, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = norm(width)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class TorchvisionBottleneck(nn.Module):
    """Stride and dilation in the grouped 3x3."""

    def __init__(
        self,
        cin=CIN,
        width=8,
        cout=CIN,
        stride=1,
        groups=1,
        dilation=1,
        norm: NormFactory = nn.BatchNorm2d,
    ):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, width, 1, bias=False), norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, cout, 1, bias=False), norm(cout)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), norm(cout))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class TorchvisionQuantizable(TorchvisionBasic):
    """FloatFunctional for addition and ReLU; its observer is an Identity until quantisation is prepared."""

    def __init__(self):
        super().__init__()
        self.add_relu = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.add_relu.add_relu(self.bn2(self.conv2(out)), x)


class ConvNormActivation(nn.Sequential):
    def __init__(self, cin, cout, kernel=3, stride=1, groups=1, activation: type[nn.Module] | None = nn.ReLU):
        layers = [
            nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(cout),
        ]
        super().__init__(*layers, *([activation(inplace=True)] if activation else []))


class RegNetX(nn.Module):
    """A grouped bottleneck in a Sequential; the projection is the first term of the sum."""

    def __init__(self, stride=1):
        super().__init__()
        cout = 2 * CIN if stride > 1 else CIN
        self.proj = ConvNormActivation(CIN, cout, 1, stride, activation=None) if stride > 1 else None
        self.f = nn.Sequential(
            OrderedDict(
                a=ConvNormActivation(CIN, cout, 1),
                b=ConvNormActivation(cout, cout, 3, stride, groups=4),
                c=ConvNormActivation(cout, cout, 1, activation=None),
            )
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.f(x) + x if self.proj is None else self.proj(x) + self.f(x)
        return self.activation(x)


class TimmBottleneck(nn.Module):
    """An activation module for each place, Identity where an option is off, optional average in the shortcut."""

    def __init__(self, cin=CIN, width=8, cout=CIN, stride=1, average=False):
        super().__init__()
        self.conv1, self.bn1, self.act1 = (
            nn.Conv2d(cin, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
        )
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.drop_block, self.act2, self.aa = nn.Identity(), nn.ReLU(inplace=True), nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(width, cout, 1, bias=False), nn.BatchNorm2d(cout)
        self.se = self.drop_path = self.downsample = None
        self.act3 = nn.ReLU(inplace=True)
        if stride != 1 or cin != cout:
            pool = (
                nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if average else nn.Identity()
            )
            conv = nn.Conv2d(cin, cout, 1, 1 if average else stride, bias=False)
            self.downsample = nn.Sequential(pool, conv, nn.BatchNorm2d(cout))

    def forward(self, x):
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act3(x)


class FastaiConvLayer(nn.Sequential):
    def __init__(self, cin, cout, kernel=3, stride=1, act=True):
        conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(cout), *([nn.ReLU()] if act else []))


class FastaiResBlock(nn.Module):
    """The shortcut pools first, then convolves."""

    def __init__(self, stride=1, cout=CIN):
        super().__init__()
        self.convpath = nn.Sequential(
            FastaiConvLayer(CIN, 8, 1),
            FastaiConvLayer(8, 8, 3, stride),
            FastaiConvLayer(8, cout, 1, act=False),
        )
        idpath = [nn.AvgPool2d(stride, ceil_mode=True)] if stride > 1 else []
        if cout != CIN:
            idpath.append(FastaiConvLayer(CIN, cout, 1, act=False))
        self.idpath = nn.Sequential(*idpath)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.convpath(x) + self.idpath(x))
