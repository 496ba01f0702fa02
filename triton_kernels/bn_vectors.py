"""The channel vectors around a BN layer, each in one launch, computed in float64 and rounded once."""

import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout
from fusedres.triton_kernels.launch import launch

BLOCK = 128


@triton.jit(do_not_specialize=["C"])
def bn_scale_shift_kernel(
    mean, var, weight, bias, invstd, scale, shift, C, EPS: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < C
    inv = 1.0 / tl.sqrt(tl.load(var + i, mask=keep, other=1.0).to(tl.float64) + EPS)
    gain = inv
    if weight is not None:
        gain = tl.load(weight + i, mask=keep, other=0.0).to(tl.float64) * inv
    gain = gain.to(scale.dtype.element_ty)
    # from the rounded scale, so that the two errors cancel in scale*mean + shift = bias
    offset = -tl.load(mean + i, mask=keep, other=0.0).to(tl.float64) * gain.to(tl.float64)
    if bias is not None:
        offset += tl.load(bias + i, mask=keep, other=0.0).to(tl.float64)
    tl.store(invstd + i, inv.to(invstd.dtype.element_ty), mask=keep)
    tl.store(scale + i, gain, mask=keep)
    tl.store(shift + i, offset.to(shift.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["P", "C"])
def bn_backward_coefficients_kernel(
    sum_dz, sum_dz_centered, mean, invstd, scale, dweight, B, K, P, C, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < C
    inv = tl.load(invstd + i, mask=keep, other=0.0).to(tl.float64)
    gain = tl.load(scale + i, mask=keep, other=0.0).to(tl.float64)
    dw = inv * tl.load(sum_dz_centered + i, mask=keep, other=0.0).to(tl.float64)
    tl.store(dweight + i, dw.to(dweight.dtype.element_ty), mask=keep)
    if B is not None:
        slope = (-gain * inv * dw / P).to(B.dtype.element_ty)
        level = -gain * tl.load(sum_dz + i, mask=keep, other=0.0).to(tl.float64) / P
        # from the rounded B, so that the two errors cancel in B*mean + K
        level -= slope.to(tl.float64) * tl.load(mean + i, mask=keep, other=0.0).to(tl.float64)
        tl.store(B + i, slope, mask=keep)
        tl.store(K + i, level.to(K.dtype.element_ty), mask=keep)


def bn_scale_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """invstd, scale, shift [C] in the dtype of mean [C]."""
    channels = mean.numel()
    invstd, scale, shift = (layout.empty((channels,), mean) for _ in range(3))
    launch(
        bn_scale_shift_kernel,
        (layout.cdiv(channels, BLOCK),),
        mean,
        var,
        weight,
        bias,
        invstd,
        scale,
        shift,
        C=channels,
        EPS=eps,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return invstd, scale, shift


def bn_backward_coefficients(
    sum_dz: Tensor,
    sum_dz_centered: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor,
    rows: int,
    training: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dweight, B, K [C]; B and K only in training."""
    channels = sum_dz.numel()
    dweight = layout.empty((channels,), sum_dz)
    B, K = (layout.empty((channels,), sum_dz) if training else None for _ in range(2))
    launch(
        bn_backward_coefficients_kernel,
        (layout.cdiv(channels, BLOCK),),
        sum_dz,
        sum_dz_centered,
        mean,
        invstd,
        scale,
        dweight,
        B,
        K,
        rows,
        C=channels,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return dweight, B, K
