"""Blocks whose forward does more than compute y, or does not always compute the same, each with its code."""

from __future__ import annotations

import types

import numpy as np
import torch
import torch.nn.functional as F
from spellings import TwoConvs
from torch import nn


class Path(TwoConvs):
    def path(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        return F.relu(self.path(x) + x)


class FunctionalNorm(Path):
    """The norm's tensors, with a mode and a momentum of its own."""

    def path(self, x):
        out, bn = self.conv2(F.relu(self.bn1(self.conv1(x)))), self.bn2
        return F.batch_norm(out, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, 0.3)


class FunctionalConvolution(Path):
    """The convolution's weight, without its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)

    def path(self, x):
        return self.bn2(F.conv2d(F.relu(self.bn1(self.conv1(x))), self.conv2.weight, None, 1, 1))


class CallsNormTwice(Path):
    """Once for its running statistics alone."""

    def path(self, x):
        out = self.conv1(x)
        with torch.no_grad():
            self.bn1(out)
        return self.bn2(self.conv2(F.relu(self.bn1(out))))


class CountsInBuffer(Path):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return super().forward(x)


class ReplacesBuffer(CountsInBuffer):
    def forward(self, x):
        self.count = self.count + 1
        return Path.forward(self, x)


class MonitorsInput(Path):
    """A norm whose output nobody uses still moves its statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.monitor = nn.BatchNorm2d(16)

    def forward(self, x):
        self.monitor(x)
        return super().forward(x)


class CountsInTensor(Path):
    """Not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(3)

    def forward(self, x):
        self.count[0] += 1
        return super().forward(x)


class CountsInList(Path):
    def __init__(self) -> None:
        super().__init__()
        self.count = [0]

    def forward(self, x):
        self.count[0] += 1
        return super().forward(x)


class AppendsToNestedList(Path):
    def __init__(self) -> None:
        super().__init__()
        self.log = {"sizes": []}

    def forward(self, x):
        self.log["sizes"].append(tuple(x.shape))
        return super().forward(x)


class CountsOnObject(Path):
    def __init__(self) -> None:
        super().__init__()
        self.stats = types.SimpleNamespace(count=0)

    def forward(self, x):
        self.stats.count += 1
        return super().forward(x)


class ConstrainedConv(nn.Conv2d):
    """Bounds its weight's norm before each use."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1.0)
        return super().forward(x)


class ConstrainsWeight(Path):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConstrainedConv(16, 16, 3, padding=1, bias=False)


class WritesThroughData(Path):
    def path(self, x):
        out = super().path(x)
        out.data.mul_(0.5)
        return out


class WritesWithoutGradients(Path):
    def path(self, x):
        out = super().path(x)
        with torch.no_grad():
            out.clamp_(max=0.5)
        return out


class NumpyRandom(Path):
    def forward(self, x):
        return F.relu(self.path(x) + x) if np.random.rand() < 2 else x


class LooksAtWidth(Path):
    def forward(self, x):
        return F.relu(self.path(x) + x) if x.shape[-1] >= 16 else F.relu(self.path(x))


class LooksAtBatch(Path):
    def forward(self, x):
        return F.relu(self.path(x) + x) if len(x) < 4 else F.relu(self.path(x) + x.flip(0))


class LooksAtLargeImages(Path):
    def forward(self, x):
        return F.relu(self.path(x) + x) if x[0, 0].numel() < 10000 else self.path(x)


class LooksAtGradMode(Path):
    def forward(self, x):
        return F.relu(self.path(x) + x) if torch.is_grad_enabled() else F.relu(self.path(x))


class LooksAtGradient(Path):
    def forward(self, x):
        y = super().forward(x)
        return y if y.requires_grad else y * 2


class LooksAtSingleImages(Path):
    """A path of its own for inference on one image."""

    def forward(self, x):
        single = len(x) == 1 and not self.training and not torch.is_grad_enabled()
        return F.relu(self.path(x)) if single else F.relu(self.path(x) + x)


EFFECTS = [
    CountsInBuffer,
    ReplacesBuffer,
    CountsInTensor,
    CountsInList,
    AppendsToNestedList,
    CountsOnObject,
]
IMPURE = [
    (FunctionalNorm, "not_called"),
    (FunctionalConvolution, "not_called"),
    (CallsNormTwice, "shared_module"),
    (MonitorsInput, "mutates_module"),
    (ConstrainsWeight, "mutates_module"),
    (WritesThroughData, "hidden_write"),
    (WritesWithoutGradients, "hidden_write"),
    (NumpyRandom, "random"),
    (LooksAtWidth, "shape_dependent"),
    (LooksAtBatch, "shape_dependent"),
    (LooksAtLargeImages, "shape_dependent"),
    (LooksAtGradMode, "asks_state"),
    (LooksAtSingleImages, "asks_state"),
    (LooksAtGradient, "grad_mode_dependent"),
    *((block, "mutates_module") for block in EFFECTS),
]
