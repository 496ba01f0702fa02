"""Residual blocks built as models in repositories of their own build them, detection libraries and CLIP among them."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch.nn.functional as F
from torch import nn
from torchvision_blocks import CIN, ConvNormActivation, NormFactory


class KuangliuBasic(nn.Module):
    """Functional ReLU; an empty Sequential is the identity."""

    def __init__(self, stride=1):
        super().__init__()
        cout = CIN * stride
        self.conv1, self.bn1 = nn.Conv2d(CIN, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(CIN, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def subsample_and_pad(x, planes):
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0)


class AkamasterOptionA(KuangliuBasic):
    """The shortcut without parameters: every other pixel, zero channels around."""

    def __init__(self):
        super().__init__(stride=2)
        self.shortcut = Lambda(partial(subsample_and_pad, planes=2 * CIN))


class WeiaicunzaiBottleneck(nn.Module):
    """The path in one Sequential; the last ReLU is made in forward."""

    def __init__(self, stride=2, cout=2 * CIN, groups=1):
        super().__init__()
        self.residual_function = nn.Sequential(
            nn.Conv2d(CIN, 8, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, stride, 1, groups=groups, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(CIN, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        return nn.ReLU(inplace=True)(self.residual_function(x) + self.shortcut(x))


class NormedConv(nn.Conv2d):
    """detectron2's convolution: norm and activation are attributes that its forward calls."""

    def __init__(self, *args, norm=None, activation=None, **options):
        super().__init__(*args, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class Detectron2Bottleneck(nn.Module):
    """Stride in the 1x1 or the 3x3; functional in-place ReLU between."""

    def __init__(self, stride=1, stride_in_1x1=True, norm: NormFactory = nn.BatchNorm2d):
        super().__init__()
        cout = CIN * stride
        s1, s3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = None
        if cout != CIN:
            self.shortcut = NormedConv(CIN, cout, 1, stride, bias=False, norm=norm(cout))
        self.conv1 = NormedConv(CIN, 8, 1, s1, bias=False, norm=norm(8))
        self.conv2 = NormedConv(8, 8, 3, s3, 1, bias=False, norm=norm(8))
        self.conv3 = NormedConv(8, cout, 1, bias=False, norm=norm(cout))

    def forward(self, x):
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out += shortcut
        return F.relu_(out)


class ClipBottleneck(nn.Module):
    """No strided convolution: both paths pool, where the stride is above 1."""

    def __init__(self, stride=1, width=16, cout=4 * 16):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = (
            nn.Conv2d(CIN, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
        )
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(width, cout, 1, bias=False), nn.BatchNorm2d(cout)
        self.relu3 = nn.ReLU(inplace=True)
        layers = [
            ("-1", nn.AvgPool2d(stride)),
            ("0", nn.Conv2d(CIN, cout, 1, bias=False)),
            ("1", nn.BatchNorm2d(cout)),
        ]
        self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        out += self.downsample(x)
        return self.relu3(out)


class ConvModule(nn.Module):
    """mmcv's: the norm is registered under a name of its own and found through a property; order as a tuple."""

    def __init__(self, cin, cout, kernel, stride=1, act=True):
        super().__init__()
        self.order = ("conv", "norm", "act")
        self.with_norm, self.with_activation = True, act
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
        self.norm_name = "bn"
        self.add_module(self.norm_name, nn.BatchNorm2d(cout))
        if act:
            self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self):
        return getattr(self, self.norm_name)

    def forward(self, x, activate=True, norm=True):
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm and self.with_norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


class MmcvBottleneck(nn.Module):
    """The sum in a closure, the last ReLU outside of it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = ConvModule(CIN, 8, 1), ConvModule(8, 8, 3)
        self.conv3 = ConvModule(8, CIN, 1, act=False)
        self.downsample = self.drop_path = nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        def inner(x):
            out = self.drop_path(self.conv3(self.conv2(self.conv1(x))))
            out += self.downsample(x)
            return out

        return self.relu(inner(x))


class RepVGG(nn.Module):
    """The form that is trained: 3x3, 1x1 and, where shapes allow it, a BN of the input, added."""

    def __init__(self, stride=1):
        super().__init__()
        cout = CIN * stride
        self.rbr_identity = nn.BatchNorm2d(CIN) if stride == 1 else None
        self.rbr_dense = ConvNormActivation(CIN, cout, 3, stride, activation=None)
        self.rbr_1x1 = ConvNormActivation(CIN, cout, 1, stride, activation=None)
        self.nonlinearity, self.se = nn.ReLU(), nn.Identity()

    def forward(self, x):
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.nonlinearity(self.se(self.rbr_dense(x) + self.rbr_1x1(x) + identity))


class PyclsTransform(nn.Module):
    """Runs its children in their order."""

    def __init__(self):
        super().__init__()
        self.a, self.a_bn, self.a_af = (
            nn.Conv2d(CIN, 8, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        self.b, self.b_bn, self.b_af = (
            nn.Conv2d(8, 8, 3, 1, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        self.c, self.c_bn = nn.Conv2d(8, CIN, 1, bias=False), nn.BatchNorm2d(CIN)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


class PyclsBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.f, self.af = None, PyclsTransform(), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.af((self.proj(x) if self.proj else x) + self.f(x))
