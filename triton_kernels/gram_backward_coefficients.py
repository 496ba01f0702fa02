"""Backward of BN over a 1x1 convolution whose output was never stored: its Cout x Cin algebra, in float64.

Two products of matrices are the library's; what surrounds them is one kernel by rows before, one by rows and one by
columns after. With frozen statistics the first kernel is all there is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout, tiles
from fusedres.triton_kernels.launch import launch


@triton.jit
def load_rest(m, center, k, size):
    """Elements k of `m - center` in float64: exact, whatever center was rounded to."""
    exact = tl.load(m + k, mask=k < size, other=0.0).to(tl.float64)
    return exact - tl.load(center + k, mask=k < size, other=0.0).to(tl.float64)


@triton.jit
def load_r(r, place, keep, sum_dz, m, center, k, size):
    """A tile of `R = dz^T (a - m)` in float64 from `dz^T (a - center)`, or with no m a tile of r as it is."""
    tile = tl.load(r + place, mask=keep, other=0.0).to(tl.float64)
    if m is not None:
        # 0 beyond the ends, also where sum_dz is infinite
        tile = tl.where(keep, tile - sum_dz[:, None] * load_rest(m, center, k, size)[None, :], 0.0)
    return tile


@triton.jit(do_not_specialize=["P"])
def gram_bn_backward_kernel(
    r,  # [COUT, CIN]
    sum_dz,  # [COUT]
    weight,  # [COUT, CIN]
    bias,  # [COUT] or None; with mean only
    mean,  # [COUT]: frozen statistics; or None
    invstd,  # [COUT]
    scale,
    m,  # [CIN]: batch statistics; or None, with center
    center,
    dweight,  # [COUT], out
    B,  # [COUT], out, or None: frozen statistics
    weight_dz,  # [COUT, CIN], out
    dW,  # [COUT, CIN], out, or None: batch statistics
    wide,  # [COUT, CIN] float64, out: W; or None, with sloped: frozen statistics
    sloped,  # [COUT, CIN] float64, out: B W
    P,
    CIN,
    COUT,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    o = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = o < COUT
    k = tl.arange(0, BK)
    row = o.to(tl.int64)[:, None] * CIN
    dz = tl.load(sum_dz + o, mask=valid, other=0.0).to(tl.float64)
    inv = tl.load(invstd + o, mask=valid, other=0.0).to(tl.float64)
    gain = tl.load(scale + o, mask=valid, other=0.0).to(tl.float64)

    centered = tl.zeros((BM,), tl.float64)  # sum dz*(c - mean)
    for k0 in range(0, CIN, BK):
        keep = valid[:, None] & (k0 + k < CIN)[None, :]
        place = row + (k0 + k)[None, :]
        w = tl.load(weight + place, mask=keep, other=0.0).to(tl.float64)
        centered += tl.sum(load_r(r, place, keep, dz, m, center, k0 + k, CIN) * w, 1)
    if mean is not None:
        level = -tl.load(mean + o, mask=valid, other=0.0).to(tl.float64)
        if bias is not None:
            level += tl.load(bias + o, mask=valid, other=0.0).to(tl.float64)
        centered += level * dz
    tl.store(dweight + o, (inv * centered).to(dweight.dtype.element_ty), mask=valid)
    slope = (-gain * inv * inv * centered / P).to(dweight.dtype.element_ty)
    if B is not None:
        tl.store(B + o, slope, mask=valid)

    for k0 in range(0, CIN, BK):
        keep = valid[:, None] & (k0 + k < CIN)[None, :]
        place = row + (k0 + k)[None, :]
        w = tl.load(weight + place, mask=keep, other=0.0).to(tl.float64)
        tl.store(weight_dz + place, (gain[:, None] * w).to(weight_dz.dtype.element_ty), mask=keep)
        if wide is not None:
            tl.store(wide + place, w, mask=keep)
            tl.store(sloped + place, slope.to(tl.float64)[:, None] * w, mask=keep)
        if dW is not None:
            found = gain[:, None] * load_r(r, place, keep, dz, m, center, k0 + k, CIN)
            tl.store(dW + place, found.to(dW.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["P"])
def gram_weight_gradient_kernel(
    r,  # [COUT, CIN]
    sum_dz,  # [COUT]
    scale,
    B,
    m,  # [CIN]
    center,
    products,  # [COUT, CIN] float64: W S
    dW,  # [COUT, CIN], out
    P,
    CIN,
    COUT,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    o = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    valid = o < COUT
    keep = valid[:, None] & (k < CIN)[None, :]
    place = o.to(tl.int64)[:, None] * CIN + k[None, :]
    dz = tl.load(sum_dz + o, mask=valid, other=0.0).to(tl.float64)
    gain = tl.load(scale + o, mask=valid, other=0.0).to(tl.float64)
    slope = tl.load(B + o, mask=valid, other=0.0).to(tl.float64)
    found = gain[:, None] * load_r(r, place, keep, dz, m, center, k, CIN)
    found += slope[:, None] * (tl.load(products + place, mask=keep, other=0.0) * P)
    tl.store(dW + place, found.to(dW.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["P"])
def gram_offset_kernel(
    products,  # [CIN, CIN] float64: W^T (B W)
    weight_dz,  # [COUT, CIN]
    sum_dz,  # [COUT]
    m,  # [CIN]
    center,
    weight_a,  # [CIN, CIN], out
    offset,  # [CIN], out
    P,
    CIN,
    COUT,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    step = tl.arange(0, BM)
    of_dz = tl.zeros((BN,), tl.float64)
    for o0 in range(0, COUT, BM):
        o = o0 + step
        keep = (o < COUT)[:, None] & (n < CIN)[None, :]
        w = tl.load(weight_dz + o.to(tl.int64)[:, None] * CIN + n[None, :], mask=keep, other=0.0)
        dz = tl.load(sum_dz + o, mask=o < COUT, other=0.0).to(tl.float64) / P
        of_dz += tl.sum(dz[:, None] * w.to(tl.float64), 0)
    of_a = tl.zeros((BN,), tl.float64)
    for k0 in range(0, CIN, BM):
        k = k0 + step
        keep = (k < CIN)[:, None] & (n < CIN)[None, :]
        place = k.to(tl.int64)[:, None] * CIN + n[None, :]
        w = tl.load(products + place, mask=keep, other=0.0)
        tl.store(weight_a + place, w.to(weight_a.dtype.element_ty), mask=keep)
        of_a += tl.sum(load_rest(m, center, k, CIN)[:, None] * w, 0)
    tl.store(offset + n, (-of_dz - of_a).to(offset.dtype.element_ty), mask=n < CIN)


def gram_backward_coefficients(
    r: Tensor,
    sum_dz: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor,
    rows: int,
    m: Tensor | None = None,
    S: Tensor | None = None,
    center: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dweight [Cout], dW [Cout, Cin], weight_dz [Cout, Cin], weight_a [Cin, Cin], offset [Cin].

    r [Cout, Cin], float32; weight [Cout, Cin, 1, 1], bias [Cout] in the activation dtype. m, S, center are None
    together, and then weight_a and offset: frozen statistics.
    """
    cout, cin = weight.shape[:2]
    batch = m is not None and S is not None
    size = {"CIN": cin, "COUT": cout, "num_warps": 4}
    by_rows, by_columns = tiles.ALGEBRA_ROWS, tiles.ALGEBRA_COLUMNS
    grid = layout.cdiv(cout, by_rows[0])
    dweight, dW = layout.empty((cout,), r), layout.empty((cout, cin), r)
    weight_dz = layout.empty((cout, cin), r)
    B = layout.empty((cout,), r) if batch else None
    wide, sloped = (layout.empty((cout, cin), r, torch.float64) if batch else None for _ in range(2))
    launch(
        gram_bn_backward_kernel,
        (grid,),
        r,
        sum_dz,
        weight,
        None if batch else bias,
        None if batch else mean,
        invstd,
        scale,
        m,
        center,
        dweight,
        B,
        weight_dz,
        None if batch else dW,
        wide,
        sloped,
        rows,
        BM=by_rows[0],
        BK=by_rows[1],
        **size,
    )
    if m is None or S is None or wide is None or sloped is None:
        return dweight, dW, weight_dz, None, None
    launch(
        gram_weight_gradient_kernel,
        (grid, layout.cdiv(cin, by_rows[1])),
        r,
        sum_dz,
        scale,
        B,
        m,
        center,
        torch.mm(wide, S.double()),
        dW,
        rows,
        BM=by_rows[0],
        BK=by_rows[1],
        **size,
    )
    weight_a, offset = layout.empty((cin, cin), r), layout.empty((cin,), r)
    launch(
        gram_offset_kernel,
        (layout.cdiv(cin, by_columns[1]),),
        torch.mm(wide.t(), sloped),
        weight_dz,
        sum_dz,
        m,
        center,
        weight_a,
        offset,
        rows,
        BM=by_columns[0],
        BN=by_columns[1],
        **size,
    )
    return dweight, dW, weight_dz, weight_a, offset
