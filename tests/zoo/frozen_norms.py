"""Norms whose statistics and affine parameters are constants, as detection libraries write them, and look-alikes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn, ones, zeros


class FrozenNorm(nn.Module):
    """torchvision's: four buffers, reshaped first; eps may be written later."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (
            ("weight", ones(channels)),
            ("bias", zeros(channels)),
            ("running_mean", zeros(channels)),
            ("running_var", ones(channels)),
        ):
            self.register_buffer(name, value)

    def vectors(self):
        names = ("weight", "bias", "running_mean", "running_var")
        return [getattr(self, name).reshape(1, -1, 1, 1) for name in names]

    def forward(self, x):
        weight, bias, mean, var = self.vectors()
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class CastingFrozenNorm(FrozenNorm):
    """detectron2's: in vectors, cast to the input's dtype; torch's batch_norm where no gradient is wanted."""

    def forward(self, x):
        if not x.requires_grad:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        scale, shift = scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)
        return x * scale.to(x.dtype) + shift.to(x.dtype)


class ConstantEpsFrozenNorm(FrozenNorm):
    """DETR's: eps is a number in its forward, no attribute."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.eps

    def forward(self, x):
        weight, bias, mean, var = self.vectors()
        scale = weight * (var + 1e-3).rsqrt()
        return x * scale + (bias - mean * scale)


class AddsEpsAfterRoot(FrozenNorm):
    def forward(self, x):
        weight, bias, mean, var = self.vectors()
        scale = weight * (var.rsqrt() + self.eps)
        return x * scale + (bias - mean * scale)


class SwapsVectors(FrozenNorm):
    def forward(self, x):
        weight, bias, mean, var = self.vectors()
        scale = bias * (var + self.eps).rsqrt()
        return x * scale + (weight - mean * scale)


class ScalesMeanByWeight(FrozenNorm):
    def forward(self, x):
        weight, bias, mean, var = self.vectors()
        return x * (weight * (var + self.eps).rsqrt()) + (bias - mean * weight)


class AddsMean(FrozenNorm):
    def forward(self, x):
        weight, bias, mean, var = self.vectors()
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias + mean * scale)


class HalvesBias(FrozenNorm):
    def forward(self, x):
        weight, bias, mean, var = self.vectors()
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (0.5 * bias - mean * scale)


class AddsTwice(FrozenNorm):
    """The number is not added to the variance once."""

    def forward(self, x):
        weight, bias, mean, var = self.vectors()
        scale = weight * (var + self.eps + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class ActsOnWidth(FrozenNorm):
    """Its vectors lie along W, not C."""

    def vectors(self):
        return [v.reshape(1, 1, 1, -1) for v in super().vectors()]


class StandardisesFirst(FrozenNorm):
    """Statistics of the input where it trains."""

    def forward(self, x):
        weight, bias, mean, var = self.vectors()
        if self.training:
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


LOOK_ALIKES = [
    AddsEpsAfterRoot,
    SwapsVectors,
    ScalesMeanByWeight,
    AddsMean,
    HalvesBias,
    AddsTwice,
    ActsOnWidth,
    StandardisesFirst,
]
