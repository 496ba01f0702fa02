"""More blocks that must be left alone, each with its code: other norms, wrapped weights, checkpointing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spellings import InPlaceAdd, TwoConvs
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint


class Checkpointed(TwoConvs):
    """Its forward gives up activations and makes them again; fused, it would keep them."""

    def path(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        return F.relu(checkpoint(self.path, x, use_reentrant=False) + x)


class CheckpointedReentrant(Checkpointed):
    def forward(self, x):
        return F.relu(checkpoint(self.path, x, use_reentrant=True) + x)


class BranchOff(TwoConvs):
    """The sum with a number that is not 0."""

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x + 1)


class SplitNorm(nn.BatchNorm2d):
    """Statistics of each half of the batch by itself."""

    def forward(self, x):
        n, c, h, w = x.shape
        mean, var = self.running_mean.repeat(2), self.running_var.repeat(2)
        weight, bias = self.weight.repeat(2), self.bias.repeat(2)
        halves = x.reshape(n // 2, 2 * c, h, w)
        return F.batch_norm(halves, mean, var, weight, bias, self.training, 0.1, self.eps).reshape(x.shape)


class SplitStatistics(InPlaceAdd):
    def __init__(self) -> None:
        super().__init__()
        self.bn1 = SplitNorm(16)


class CountingNorm(nn.BatchNorm2d):
    """A subclass computes the same today; what else it does, nobody knows."""

    def forward(self, x):
        return super().forward(x)


class SubclassedNorm(InPlaceAdd):
    def __init__(self) -> None:
        super().__init__()
        self.bn2 = CountingNorm(16)


class GroupNorms(InPlaceAdd):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.GroupNorm(4, 16), nn.GroupNorm(4, 16)


class WeightNormed(InPlaceAdd):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.conv2)


class Pruned(InPlaceAdd):
    def __init__(self) -> None:
        super().__init__()
        prune.l1_unstructured(self.conv1, "weight", 0.5)


class LeakyReLUs(InPlaceAdd):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.LeakyReLU()


class ChannelAttention(InPlaceAdd):
    """Two pooled branches through one perceptron."""

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        gate = torch.sigmoid(out.mean((2, 3), keepdim=True) + out.amax((2, 3), keepdim=True))
        return self.relu(out * gate + x)


class BlurredPath(TwoConvs):
    """Anti-aliasing between activation and convolution."""

    def forward(self, x):
        out = F.avg_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 1, 1)
        return F.relu(self.bn2(self.conv2(out)) + x)


LOOK_ALIKES = [
    (Checkpointed, "checkpointed"),
    (CheckpointedReentrant, "unsupported_op"),
    (BranchOff, "not_residual"),
    (SplitStatistics, "unsupported_op"),
    (SubclassedNorm, "unsupported_module"),
    (GroupNorms, "unsupported_op"),
    (WeightNormed, "unsupported_op"),
    (Pruned, "unsupported_op"),
    (LeakyReLUs, "activation_not_relu"),
    (ChannelAttention, "unsupported_op"),
    (BlurredPath, "unsupported_op"),
]
