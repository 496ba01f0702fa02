"""What the reference's ops share: packed masks, affine maps of channels, rows, and sums over rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.ops.contract import BatchNormGrads, BatchNormVectors


def bit_weights(device: torch.device) -> Tensor:
    """[1, 2, ... 128], uint8, made on the device: a copy from the host cannot be captured in a CUDA graph."""
    return 1 << torch.arange(8, dtype=torch.uint8, device=device)


def pack_mask(keep: Tensor) -> Tensor:
    """Boolean [N, C, H, W] -> uint8 [ceil(numel/8)], bit i of byte j = element 8j+i in NHWC order."""
    bits = keep.permute(0, 2, 3, 1).reshape(-1).to(torch.uint8)
    bits = F.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (bits * bit_weights(keep.device)).sum(1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The inverse of `pack_mask`: boolean, with the logical shape of `like` [N, C, H, W]."""
    n, c, h, w = like.shape
    bits = (mask[:, None] & bit_weights(mask.device)) != 0
    return bits.reshape(-1)[: like.numel()].view(n, h, w, c).permute(0, 3, 1, 2)


def per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]  # [C] -> [C, 1, 1], against [N, C, H, W]


def affine(c: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(per_channel(shift), c.to(scale.dtype), per_channel(scale))


def activation(c: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """a = relu(scale*c + shift), rounded to c's dtype. [N, C, H, W]"""
    return torch.relu(affine(c, scale, shift).to(c.dtype))


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of a dense tensor like x."""
    channels_last = torch.empty_like(x).is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def rows_by_channels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # [N, C, H, W] -> [P, C]


def weight_matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1).double().contiguous()  # [Cout, Cin, 1, 1] -> W [Cout, Cin] in float64


def masked_gradient(
    dy: Tensor, c: Tensor, vectors: BatchNormVectors, mask: Tensor | None, relu: bool
) -> Tensor:
    """dz, see `BnAddReluBackwardReduce`. [N, C, H, W]"""
    if mask is not None:
        return torch.where(unpack_mask(mask, dy), dy, 0)
    if relu:
        return torch.where(affine(c, vectors.scale, vectors.shift).to(c.dtype) <= 0, 0, dy)
    return dy


def apply_coefficients(dz: Tensor, c: Tensor, grads: BatchNormGrads, mean: Tensor | None = None) -> Tensor:
    """dc = A*dz + B*c + K, rounded to c's dtype. [N, C, H, W]

    With mean [C] as A*dz + B*(c - mean) - A*dbias/P, the same in exact arithmetic: B*c + K cancels where the mean
    is large against the deviation.
    """
    dc = dz.to(grads.A.dtype) * per_channel(grads.A)
    if grads.B is not None and mean is not None:
        centered = c.to(mean.dtype) - per_channel(mean)
        rows = c.shape[0] * c.shape[2] * c.shape[3]
        dc = dc + affine(centered, grads.B, -grads.A * grads.dbias / max(rows, 1))
    elif grads.B is not None and grads.K is not None:
        dc = dc + affine(c, grads.B, grads.K)
    return torch.empty_like(c).copy_(dc)


def sums(dz: Tensor, c: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    dz = dz.to(mean.dtype)
    return dz.sum((0, 2, 3)), (dz * (c.to(mean.dtype) - per_channel(mean))).sum((0, 2, 3))


def normalised(
    c: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
) -> Tensor:
    """scale*c + shift + r, or c + r without a scale, in the accumulation dtype. [N, C, H, W]"""
    z = c if scale is None or shift is None else affine(c, scale, shift)
    if residual is None:
        return z
    if residual_scale is None or residual_shift is None:
        return z + residual
    return z + affine(residual, residual_scale, residual_shift)


def rectified(z: Tensor, relu: bool, save_mask: bool) -> tuple[Tensor, Tensor | None]:
    """y and its packed mask, or None."""
    y = torch.relu(z) if relu else z
    return y, pack_mask(~(y <= 0)) if save_mask else None


def selected(dy: Tensor, mask: Tensor | None) -> Tensor:
    """dz: where(mask, dy, 0), or dy itself without a mask. [N, C, H, W]"""
    return dy if mask is None else torch.where(unpack_mask(mask, dy), dy, 0)
