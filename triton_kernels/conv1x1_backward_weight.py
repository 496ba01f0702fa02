"""Raw weight gradient `R = dz^T a` of a 1x1 convolution in float32, both operands made in the prologue."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout, tiles
from fusedres.triton_kernels.elementwise import activation, load_vector, select_in_tile
from fusedres.triton_kernels.gram import is_far, sample
from fusedres.triton_kernels.launch import launch
from fusedres.triton_kernels.merge import merge_sums

# would round a - center to 8 bits, where dz*a is exact in float32
ROUNDS_COARSELY = (torch.bfloat16,)


@triton.jit(do_not_specialize=["P"])
def pivot_kernel(
    c,  # [P, CIN]
    scale,  # [CIN]
    shift,
    center,  # [CIN]
    pivot,  # [CIN], out: what to subtract from a before the product
    rest,  # [CIN], out: center - pivot
    P,
    CIN,
    COARSE: tl.constexpr,
    SAMPLE: tl.constexpr,
    BN: tl.constexpr,
):
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    exact = tl.load(center + i, mask=i < CIN, other=0.0)
    value = exact
    if c.dtype.element_ty != tl.float32:
        # Far from 0 a - pivot is exact. Elsewhere it is rounded, and a pivot of 8 bits, a multiple of the spacing of
        # a's values, leaves that to the bits of a: all bits of center would round every row the same way.
        mean, m2, count = sample(c, scale, shift, i, P, CIN, SAMPLE)
        near = tl.zeros_like(exact) if COARSE else exact.to(tl.bfloat16).to(tl.float32)
        value = tl.where(is_far(mean, m2, count), exact.to(c.dtype.element_ty).to(tl.float32), near)
    tl.store(pivot + i, value, mask=i < CIN)
    tl.store(rest + i, exact - value, mask=i < CIN)


@triton.jit(do_not_specialize=["P", "ROWS"])
def conv1x1_backward_weight_kernel(
    dy,  # [P, COUT]
    mask,  # packed bits of y, or None: dz = dy
    c,  # [P, CIN]
    scale,  # [CIN], a = relu(scale*c + shift)
    shift,
    pivot,  # [CIN] or None: a is taken as it is
    partial_r,  # [ceil(P / ROWS), COUT, CIN]
    partial_dbias,  # [ceil(P / ROWS), COUT]
    P,
    ROWS,  # of a split, a multiple of BK and of 8
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    column_tiles: tl.constexpr = (CIN + BN - 1) // BN
    tiles: tl.constexpr = (COUT + BM - 1) // BM * column_tiles
    # the tiles of one split run side by side: dy and c come from L2 for all but the first
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    first = (tile // column_tiles) * BM
    o = first + tl.arange(0, BM)
    i = (tile % column_tiles) * BN + tl.arange(0, BN)
    row = tl.arange(0, BK)[:, None]
    valid_o = (o < COUT)[None, :]
    valid_i = (i < CIN)[None, :]
    base = split.to(tl.int64) * ROWS
    left = P - split * ROWS

    r = tl.zeros((BM, BN), tl.float32)
    dz_sums = tl.zeros((BK, BM), tl.float32)  # of each thread's own elements: no shuffle in a step
    for r0 in range(0, tl.minimum(left, ROWS), BK):
        valid = r0 + row < left  # [BK, 1]
        dy_place = (r0 + row) * COUT + o[None, :]  # [BK, BM]
        dz = tl.load(dy + base * COUT + dy_place, mask=valid & valid_o, other=0.0)
        if mask is not None:
            dz = select_in_tile(dz, mask + base // 8 * COUT, r0 + row, first, valid, COUT, BK, BM)
        a_place = (r0 + row) * CIN + i[None, :]  # [BK, BN]
        a = tl.load(c + base * CIN + a_place, mask=valid & valid_i, other=0.0)
        a = activation(a, scale, shift, i, CIN)
        if pivot is not None:
            a = (a.to(tl.float32) - load_vector(pivot, i, CIN)).to(c.dtype.element_ty)
        # Tensor cores truncate as they add, which over the rows of a split would take up to a ten-thousandth off a
        # mean: each product is added by itself, rounded. The last argument keeps the addition from being folded in.
        r += tl.dot(tl.trans(dz), a, input_precision=PRECISION, max_num_imprecise_acc=BK)
        dz_sums += dz.to(tl.float32)

    place = (split.to(tl.int64) * COUT + o[:, None]) * CIN + i[None, :]
    tl.store(partial_r + place, r, mask=(o < COUT)[:, None] & valid_i)
    dbias = tl.sum(dz_sums, 0)
    written = tl.where(tile % column_tiles == 0, COUT, 0)  # by the first column tile
    tl.store(partial_dbias + split.to(tl.int64) * COUT + o, dbias, mask=o < written)


def pivot_of(center: Tensor, c: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """What to subtract from a before the product, and what is left of center to subtract after it, each [Cin]."""
    cin, columns = c.shape[1], tiles.GRAM_SAMPLE_COLUMNS
    pivot, rest = (layout.empty((cin,), c, torch.float32) for _ in range(2))
    launch(
        pivot_kernel,
        (layout.cdiv(cin, columns),),
        c,
        scale,
        shift,
        center,
        pivot,
        rest,
        layout.rows(c),
        CIN=cin,
        COARSE=c.dtype in ROUNDS_COARSELY,
        SAMPLE=tiles.GRAM_SAMPLE,
        BN=columns,
        num_warps=4,
    )
    return pivot, rest


def conv1x1_backward_weight(
    dy: Tensor,
    mask: Tensor | None,
    c: Tensor,
    scale: Tensor,
    shift: Tensor,
    center: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`Rc = dz^T (a - center)` [Cout, Cin], dbias [Cout], float32; dy [N, Cout, H, W], c [N, Cin, H, W]."""
    c = layout.nhwc(c)
    cout, cin, total = dy.shape[1], c.shape[1], layout.rows(c)
    pivot, rest = (None, None) if center is None else pivot_of(center, c, scale, shift)
    tile = tiles.weight_tile(cout, cin)
    split_rows = tiles.weight_rows(cout, cin, total)
    splits = layout.cdiv(total, split_rows)
    partial_r = layout.empty((splits, cout, cin), c, torch.float32)
    partial_dbias = layout.empty((splits, cout), c, torch.float32)
    launch(
        conv1x1_backward_weight_kernel,
        (splits * layout.cdiv(cout, tile.bm) * layout.cdiv(cin, tile.bn),),
        layout.nhwc(dy),
        mask,
        c,
        scale,
        shift,
        pivot,
        partial_r,
        partial_dbias,
        total,
        split_rows,
        CIN=cin,
        COUT=cout,
        PRECISION=layout.precision(c),
        BM=tile.bm,
        BN=tile.bn,
        BK=tile.bk,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    dbias = merge_sums(partial_dbias)
    outer = None if rest is None else (dbias, rest)
    return merge_sums(partial_r, outer, finite_left=c.dtype not in ROUNDS_COARSELY), dbias
