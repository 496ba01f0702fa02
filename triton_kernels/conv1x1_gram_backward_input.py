"""Input gradient of a 1x1 convolution under BN whose output was never stored: the Gram identity."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout, tiles
from fusedres.triton_kernels.elementwise import activation, column_sums, load_vector, select_in_tile
from fusedres.triton_kernels.launch import launch
from fusedres.triton_kernels.merge import merge_sums
from fusedres.triton_kernels.wgmma import must_wait, wait


@triton.jit
def finite(x):
    """x, and 0 where x is not finite."""
    return tl.where(x - x == 0.0, x, 0.0)


@triton.jit
def multiply_terms(
    x,  # [BM, BK], the same for every term
    weight,  # [TERMS, SIZE, CIN]
    k,  # [BK], rows of a term
    n,  # [BN], columns
    acc,  # [BM, BN]
    SIZE: tl.constexpr,
    CIN: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    WAIT: tl.constexpr,
):
    """acc + x times the sum of the weight's terms; beyond the first, x is 0 where it is not finite.

    Inf times a term that is 0, or of another sign, would be NaN.
    """
    keep = (k < SIZE)[:, None] & (n < CIN)[None, :]
    place = k[:, None] * CIN + n[None, :]  # [BK, BN]
    w = tl.load(weight + place, mask=keep, other=0.0)
    # made before the first product, so that it need not be made while that is in flight
    rest = finite(x)
    acc = wait(tl.dot(x, w, acc, input_precision=PRECISION), WAIT)
    if TERMS > 1:
        w = tl.load(weight + SIZE * CIN + place, mask=keep, other=0.0)
        acc = wait(tl.dot(rest, w, acc, input_precision=PRECISION), WAIT)
    return acc


@triton.jit(do_not_specialize=["P"])
def conv1x1_gram_backward_input_kernel(
    dy,  # [P, COUT]
    mask,  # packed bits of y, or None: dz = dy
    c,  # [P, CIN], raw output of the layer below
    mean,  # [CIN], of c
    scale,  # [CIN], BN below: a = relu(scale*c + shift)
    shift,
    weight_dz,  # [TERMS, COUT, CIN] in dy's dtype, their sum is the weight
    weight_a,  # [TERMS, CIN, CIN], likewise; or None: frozen statistics
    center,  # [CIN], or None: a is taken as it is
    offset,  # [CIN] or None
    dz_below,  # [P, CIN]
    tile_sums,  # [ceil(P / BM), 2, CIN]: sum dz_below, sum dz_below*(c - mean)
    P,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    TERMS: tl.constexpr,  # 1 or 2
    PRECISION: tl.constexpr,
    WAIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    column_tiles: tl.constexpr = (CIN + BN - 1) // BN
    row_tile = tl.program_id(0) // column_tiles
    row = tl.arange(0, BM)[:, None]
    n = (tl.program_id(0) % column_tiles) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    valid = row_tile * BM + row < P  # [BM, 1]
    valid_n = n < CIN
    base = row_tile.to(tl.int64) * BM
    dy_tile = dy + base * COUT
    c_tile = c + base * CIN

    acc = tl.zeros((BM, BN), tl.float32)
    if offset is not None:
        acc += load_vector(offset, n, CIN)
    # Each dz, and each a below, is loaded and made once for both terms of its weight. dz, a and the mask go together,
    # so that errors of rounded weights would not average out.
    for k0 in range(0, COUT, BK):
        dy_place = row * COUT + (k0 + k)[None, :]  # [BM, BK]
        dz = tl.load(dy_tile + dy_place, mask=valid & (k0 + k < COUT)[None, :], other=0.0)
        if mask is not None:
            # BM is a multiple of 8, so a tile starts at bit 0 of a byte for any channel count
            dz = select_in_tile(dz, mask + base // 8 * COUT, row, k0, valid, COUT, BM, BK)
        acc = multiply_terms(dz, weight_dz, k0 + k, n, acc, COUT, CIN, TERMS, PRECISION, WAIT)

    if weight_a is not None:
        for k0 in range(0, CIN, BK):
            c_place = row * CIN + (k0 + k)[None, :]  # [BM, BK]
            ck = tl.load(c_tile + c_place, mask=valid & (k0 + k < CIN)[None, :], other=0.0)
            a = activation(ck, scale, shift, k0 + k, CIN)
            if center is not None:
                a = a - load_vector(center, k0 + k, CIN)
            acc = multiply_terms(a, weight_a, k0 + k, n, acc, CIN, CIN, TERMS, PRECISION, WAIT)

    keep = valid & valid_n[None, :]
    place = row * CIN + n[None, :]  # [BM, BN]
    cn = tl.load(c_tile + place, mask=keep, other=0.0)
    an = activation(cn, scale, shift, n, CIN)
    dz = tl.where(an <= 0, 0.0, acc).to(dz_below.dtype.element_ty)
    tl.store(dz_below + base * CIN + place, dz, mask=keep)
    dz = tl.where(keep, dz.to(tl.float32), 0.0)
    centered = tl.where(keep, cn.to(tl.float32) - load_vector(mean, n, CIN), 0.0)
    sums = tile_sums + row_tile.to(tl.int64) * 2 * CIN + n
    tl.store(sums, column_sums(dz, BM), mask=valid_n)
    tl.store(sums + CIN, column_sums(dz * centered, BM), mask=valid_n)


@triton.jit
def split_weight_kernel(
    weight,  # [ROWS, CIN]
    center,  # [ROWS], or None with offset and moved_offset
    offset,  # [CIN]
    terms,  # [2, ROWS, CIN], out: weight in the activation dtype, and what that leaves of it
    moved_offset,  # [CIN], out: offset - center (the sum of the terms)
    ROWS,
    CIN,
    SHARE,  # rows of a program: all of them where it adds them up
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * SHARE
    added = tl.zeros((BN,), tl.float64)
    for k0 in range(0, SHARE, BM):
        k = first + k0 + tl.arange(0, BM)
        keep = (k < ROWS)[:, None] & (n < CIN)[None, :]
        place = k.to(tl.int64)[:, None] * CIN + n[None, :]
        w = tl.load(weight + place, mask=keep, other=0.0)
        high = w.to(terms.dtype.element_ty)
        low = tl.where(high - high == 0.0, w - high.to(tl.float32), 0.0).to(terms.dtype.element_ty)
        tl.store(terms + place, high, mask=keep)
        tl.store(terms + ROWS * CIN + place, low, mask=keep)
        if center is not None:
            c = tl.load(center + k, mask=k < ROWS, other=0.0).to(tl.float64)
            added += tl.sum(c[:, None] * (high.to(tl.float64) + low.to(tl.float64)), 0)
    if center is not None:
        exact = tl.load(offset + n, mask=n < CIN, other=0.0).to(tl.float64) - added
        tl.store(moved_offset + n, exact.to(moved_offset.dtype.element_ty), mask=n < CIN)


def split_weight(
    weight: Tensor, c: Tensor, center: Tensor | None = None, offset: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """weight [R, Cin] as two terms [2, R, Cin] of c's dtype; with center [R] also the offset [Cin] for an a without."""
    size, cin = weight.shape
    terms = layout.empty((2, size, cin), c)
    moved_offset = None if offset is None else layout.empty((cin,), offset)
    rows, columns = tiles.ALGEBRA_COLUMNS
    share = rows if center is None else layout.cdiv(size, rows) * rows
    launch(
        split_weight_kernel,
        (layout.cdiv(cin, columns), layout.cdiv(size, share)),
        weight.contiguous(),
        center,
        offset,
        terms,
        moved_offset,
        ROWS=size,
        CIN=cin,
        SHARE=share,
        BM=rows,
        BN=columns,
        num_warps=4,
    )
    return terms, moved_offset


def conv1x1_gram_backward_input(
    dy: Tensor,
    mask: Tensor | None,
    c: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight_dz: Tensor,
    weight_a: Tensor | None = None,
    center: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz_below [N, Cin, H, W] and its two sums [Cin]; dy [N, Cout, H, W], c like dz_below, not empty."""
    cout, cin = weight_dz.shape
    total = layout.rows(c)
    tile = tiles.output_tile(tiles.CONV1X1_GRAM_BACKWARD_INPUT, cin, cout)
    row_tiles = layout.cdiv(total, tile.bm)
    terms = 1 if c.dtype == torch.float32 else 2
    if terms == 2:
        weight_dz, _ = split_weight(weight_dz, c)
        if weight_a is not None:
            # a - center would round, and a is exact as it is: what center adds goes into the offset, in float64
            weight_a, offset = split_weight(weight_a, c, center, offset)
            center = None
    dz_below = layout.empty(tuple(c.shape), c)
    tile_sums = layout.empty((row_tiles, 2, cin), c, torch.float32)
    launch(
        conv1x1_gram_backward_input_kernel,
        (row_tiles * layout.cdiv(cin, tile.bn),),
        layout.nhwc(dy),
        mask,
        layout.nhwc(c),
        mean,
        scale,
        shift,
        weight_dz.contiguous(),
        None if weight_a is None else weight_a.contiguous(),
        center,
        offset,
        dz_below,
        tile_sums,
        total,
        CIN=cin,
        COUT=cout,
        TERMS=terms,
        PRECISION=layout.precision(c),
        WAIT=must_wait(c),
        BM=tile.bm,
        BN=tile.bn,
        BK=tile.bk,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    sums = merge_sums(tile_sums)
    return dz_below, sums[0], sums[1]
