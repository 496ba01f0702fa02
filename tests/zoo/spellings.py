"""Residual blocks in the spellings that models in the wild use, and look-alikes that must be left alone."""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


def conv_bn(cin: int, cout: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout)]


class TwoConvs(nn.Module):
    """The parts most spellings share; subclasses write forward."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(channels, channels)
        self.conv2, self.bn2 = conv_bn(channels, channels)
        self.relu = nn.ReLU(inplace=True)


class InPlaceAdd(TwoConvs):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class FunctionalReLU(TwoConvs):
    def forward(self, x):
        return F.relu(torch.add(x, self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))))


class CallsForward(TwoConvs):
    """The submodules' forward, past their call."""

    def forward(self, x):
        out = self.relu(self.bn1.forward(self.conv1.forward(x)))
        return self.relu(self.bn2.forward(self.conv2.forward(out)) + x)


class OptionsInObjects(TwoConvs):
    """Read, never written."""

    def __init__(self) -> None:
        super().__init__()
        self.options = SimpleNamespace(add=True, nested={"layers": [None, (1, 2)]})

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + x) if self.options.add else F.relu(out)


class ReLUMadeInForward(TwoConvs):
    def forward(self, x):
        f = self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x)))))
        return nn.ReLU(inplace=True)(f + x)


class ConvWithNorm(nn.Conv2d):
    """A convolution that calls its norm and activation itself."""

    def __init__(self, *args, norm, activation=None, **options) -> None:
        super().__init__(*args, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = self.norm(super().forward(x))
        return x if self.activation is None else self.activation(x)


class NormInsideConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvWithNorm(
            16, 16, 3, padding=1, bias=False, norm=nn.BatchNorm2d(16), activation=F.relu_
        )
        self.conv2 = ConvWithNorm(16, 32, 3, stride=2, padding=1, bias=False, norm=nn.BatchNorm2d(32))
        self.shortcut = ConvWithNorm(16, 32, 1, stride=2, bias=False, norm=nn.BatchNorm2d(32))

    def forward(self, x):
        return F.relu_(self.conv2(self.conv1(x)) + self.shortcut(x))


class SequentialPath(nn.Module):
    """The main path in one Sequential, the empty Sequential as identity."""

    def __init__(self) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *conv_bn(16, 8, 1), nn.ReLU(), *conv_bn(8, 8), nn.ReLU(), *conv_bn(8, 16, 1)
        )
        self.shortcut = nn.Sequential()

    def forward(self, x):
        return F.relu(self.path(x) + self.shortcut(x))


class PadShortcut(nn.Module):
    """Subsampling and zero padding of channels, without parameters."""

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))


class OptionA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(16, 32, stride=2)
        self.conv2, self.bn2 = conv_bn(32, 32)
        self.shortcut = PadShortcut()

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return F.relu(out)


class PooledShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *conv_bn(16, 8, 1), nn.ReLU(), *conv_bn(8, 8, stride=2), nn.ReLU(), *conv_bn(8, 32, 1)
        )
        self.downsample = nn.Sequential(nn.AvgPool2d(2), *conv_bn(16, 32, 1))

    def forward(self, x):
        return F.relu(self.downsample(x) + self.path(x))


class IdentityModulesBetween(TwoConvs):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Identity()

    def forward(self, x):
        out = self.relu(self.drop(self.bn1(self.conv1(x))))
        return self.relu(self.drop(self.bn2(self.conv2(out))) + x)


MATCHED = [
    InPlaceAdd,
    FunctionalReLU,
    CallsForward,
    OptionsInObjects,
    ReLUMadeInForward,
    NormInsideConv,
    SequentialPath,
    OptionA,
    PooledShortcut,
    IdentityModulesBetween,
]


class PreActivation(TwoConvs):
    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + x


class BareAddition(TwoConvs):
    def forward(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x


class SqueezeExcite(TwoConvs):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out * out.mean((2, 3), keepdim=True).sigmoid() + x)


class SiLUBlock(TwoConvs):
    def forward(self, x):
        return F.silu(self.bn2(self.conv2(F.silu(self.bn1(self.conv1(x))))) + x)


class ScaledShortcut(TwoConvs):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(torch.add(out, x, alpha=2))


class InlineShortcut(TwoConvs):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + F.avg_pool2d(x, 3, 1, 1))


class TrainingBranch(TwoConvs):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + x) if self.training else F.relu(out)


class PythonRandom(TwoConvs):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + x) if random.random() < 2 else x


class DropPath(TwoConvs):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(F.dropout(out, 0.5, self.training) + x)


class MutatesInput(TwoConvs):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x.relu_()))))) + x)


class StoresState(TwoConvs):
    def forward(self, x):
        self.last = out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + x)


class SharedNorm(TwoConvs):
    def forward(self, x):
        return F.relu(self.bn1(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class HiddenCast(TwoConvs):
    """A cast that a float32 run does not show."""

    def forward(self, x):
        out = self.bn1(self.conv1(x)).float()
        return F.relu(self.bn2(self.conv2(F.relu(out).to(x.dtype))) + x)


class DetachedShortcut(TwoConvs):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x.detach())


class Broadcasts(TwoConvs):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x[:, :, :1, :1])


LEFT_ALONE = [
    (PreActivation, "no_final_relu"),
    (BareAddition, "no_final_relu"),
    (SqueezeExcite, "unsupported_op"),
    (SiLUBlock, "activation_not_relu"),
    (ScaledShortcut, "not_residual"),
    (InlineShortcut, "shortcut_not_a_module"),
    (TrainingBranch, "mode_dependent"),
    (PythonRandom, "random"),
    (DropPath, "unsupported_op"),
    (MutatesInput, "mutates_input"),
    (StoresState, "mutates_module"),
    (SharedNorm, "shared_module"),
    (HiddenCast, "unsupported_op"),
    (DetachedShortcut, "not_residual"),
    (Broadcasts, "not_residual"),
]
