"""First two moments of an activation made in the prologue: `m = E[a]`, `S = E[(a-m)(a-m)^T]`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout, tiles
from fusedres.triton_kernels.elementwise import activation, load_vector, tile_moments
from fusedres.triton_kernels.launch import launch
from fusedres.triton_kernels.merge import merge_sums


@triton.jit
def sample(c, scale, shift, i, P, CIN, SAMPLE: tl.constexpr):
    """Mean in float32, M2 and number of `a = relu(scale*c + shift)`, channels i, over rows spread along c [P, CIN]."""
    step = tl.arange(0, SAMPLE)
    count = tl.minimum(P, SAMPLE)
    row = step.to(tl.int64) * (P // count)
    valid = step < count
    a = tl.load(c + row[:, None] * CIN + i[None, :], mask=valid[:, None] & (i < CIN)[None, :], other=0.0)
    mean, m2 = tile_moments(activation(a, scale, shift, i, CIN), valid, count, SAMPLE)
    return mean.to(tl.float32), m2, count


@triton.jit
def is_far(mean, m2, count):
    """Whether a mean lies more than 4 standard deviations from 0.

    16-bit values and their mean then mostly lie within a factor of 2, where their difference is exact in their dtype
    (Sterbenz); below that, products lose little to cancellation.
    """
    return mean * mean * count > 16.0 * m2


@triton.jit(do_not_specialize=["P"])
def gram_reference_kernel(
    c,  # [P, CIN]
    scale,  # [CIN]
    shift,
    reference,  # [CIN] float32, out: a value to subtract from a before squares are formed
    P,
    CIN,
    SAMPLE: tl.constexpr,
    BN: tl.constexpr,
):
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    mean, m2, count = sample(c, scale, shift, i, P, CIN, SAMPLE)
    far = is_far(mean, m2, count)
    if c.dtype.element_ty == tl.float32:
        far = mean == mean
    rounded = mean.to(c.dtype.element_ty).to(tl.float32)
    tl.store(reference + i, tl.where(far, rounded, 0.0), mask=i < CIN)


@triton.jit
def upper_tile(i, j, tiles):
    """Place of tile (i, j), i <= j, among the tiles of the upper triangle, row by row, `tiles` in the first one."""
    return i * (2 * tiles - i - 1) // 2 + j


@triton.jit(do_not_specialize=["P"])
def gram_kernel(
    c,  # [P, CIN]
    scale,  # [CIN], a = relu(scale*c + shift)
    shift,
    reference,  # [CIN]
    partial_products,  # [splits, tiles, BN, BN], of the upper triangle: sum a'^T a', a' = a - reference, 0 past CIN
    partial_sums,  # [splits, CIN]: sum a'
    P,
    CIN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tiles: tl.constexpr = (CIN + BN - 1) // BN
    split = tl.program_id(0) // (tiles * tiles)
    tile_i = tl.program_id(0) % (tiles * tiles) // tiles
    tile_j = tl.program_id(0) % tiles
    if tile_j < tile_i:  # S is symmetric
        return
    i = tile_i * BN + tl.arange(0, BN)
    j = tile_j * BN + tl.arange(0, BN)
    row = tl.arange(0, BK)[:, None]
    ri, rj = load_vector(reference, i, CIN), load_vector(reference, j, CIN)
    tile = c + split.to(tl.int64) * ROWS * CIN
    left = P - split * ROWS

    # float64, because a difference of large numbers follows: S = sum a'a'^T/P - E[a']E[a']^T
    products = tl.zeros((BN, BN), tl.float64)
    sums = tl.zeros((BN,), tl.float64)
    for r0 in range(0, tl.minimum(left, ROWS), BK):
        valid = r0 + row < left  # [BK, 1]
        ci = tl.load(tile + (r0 + row) * CIN + i[None, :], mask=valid & (i < CIN)[None, :], other=0.0)
        cj = tl.load(tile + (r0 + row) * CIN + j[None, :], mask=valid & (j < CIN)[None, :], other=0.0)
        ai = tl.where(valid, activation(ci, scale, shift, i, CIN).to(tl.float32) - ri, 0.0)
        aj = tl.where(valid, activation(cj, scale, shift, j, CIN).to(tl.float32) - rj, 0.0)
        sums += tl.sum(ai, 0).to(tl.float64)
        left_operand = tl.trans(ai.to(c.dtype.element_ty))
        products += tl.dot(left_operand, aj.to(c.dtype.element_ty), input_precision=PRECISION).to(tl.float64)

    place = split.to(tl.int64) * (tiles * (tiles + 1) // 2) + upper_tile(tile_i, tile_j, tiles)
    step = tl.arange(0, BN)
    written = tl.where(tile_i == tile_j, CIN, 0)  # by the diagonal tiles
    tl.store(partial_products + place * BN * BN + step[:, None] * BN + step[None, :], products.to(tl.float32))
    tl.store(partial_sums + split * CIN + i, sums.to(tl.float32), mask=i < written)


@triton.jit(do_not_specialize=["P"])
def gram_finish_kernel(
    products,  # [tiles, BN, BN] float64, of the upper triangle
    sums,  # [CIN] float64: sum (a - reference)
    reference,  # [CIN]
    m,  # [CIN], out
    S,  # [CIN, CIN], out
    P,
    CIN,
    BN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, column = tl.minimum(i, j), tl.maximum(i, j)
    tile = upper_tile(row // BN, column // BN, (CIN + BN - 1) // BN)
    place = (tile * BN + row % BN) * BN + column % BN
    product = tl.load(products + place, mask=j < CIN, other=0.0)
    di = tl.load(sums + i) / P
    dj = tl.load(sums + j, mask=j < CIN, other=0.0) / P
    # d - d is 0, or NaN where a channel has an Inf: its deviations from the mean are NaN
    second = product / P - di * dj + (di - di) + (dj - dj)
    tl.store(S + i * CIN + j, second.to(S.dtype.element_ty), mask=j < CIN)
    mean = tl.load(reference + j, mask=j < CIN, other=0.0).to(tl.float64) + dj
    tl.store(m + j, mean.to(m.dtype.element_ty), mask=j < tl.where(i == 0, CIN, 0))


def gram(c: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """m [Cin], S [Cin, Cin], float32, of `a = relu(scale*c + shift)`, rounded; c [N, Cin, H, W] not empty."""
    c = layout.nhwc(c)
    cin, total = c.shape[1], layout.rows(c)
    reference = layout.empty((cin,), c, torch.float32)
    columns = tiles.GRAM_SAMPLE_COLUMNS
    launch(
        gram_reference_kernel,
        (layout.cdiv(cin, columns),),
        c,
        scale,
        shift,
        reference,
        total,
        CIN=cin,
        SAMPLE=tiles.GRAM_SAMPLE,
        BN=columns,
        num_warps=4,
    )
    tile = tiles.output_tile(tiles.GRAM, cin, cin)
    split_rows = tiles.gram_rows(cin, tile.bn)
    splits, column_tiles = layout.cdiv(total, split_rows), layout.cdiv(cin, tile.bn)
    upper_tiles = column_tiles * (column_tiles + 1) // 2
    products = layout.empty((splits, upper_tiles * tile.bn, tile.bn), c, torch.float32)
    sums = layout.empty((splits, cin), c, torch.float32)
    launch(
        gram_kernel,
        (splits * column_tiles**2,),
        c,
        scale,
        shift,
        reference,
        products,
        sums,
        total,
        CIN=cin,
        PRECISION=layout.precision(c),
        ROWS=split_rows,
        BN=tile.bn,
        BK=tile.bk,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    m, S = layout.empty((cin,), c, torch.float32), layout.empty((cin, cin), c, torch.float32)
    block = 128
    launch(
        gram_finish_kernel,
        (cin, layout.cdiv(cin, block)),
        merge_sums(products, dtype=torch.float64),
        merge_sums(sums, dtype=torch.float64),
        reference,
        m,
        S,
        total,
        CIN=cin,
        BN=tile.bn,
        BLOCK=block,
        num_warps=4,
    )
    return m, S
