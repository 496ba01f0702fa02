"""Partial results of many programs to one, in float64 and in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout
from fusedres.triton_kernels.launch import launch
from fusedres.triton_kernels.tiles import MERGE_ROWS

BLOCK_ROWS = 16
BLOCK_COLUMNS = 128


@triton.jit(do_not_specialize=["T", "W", "RIGHT"])
def merge_sums_kernel(
    partials,  # [T, W]
    left,  # [LEFT] or None: the outer product left*right is subtracted from the sums
    right,  # [W / LEFT]
    out,  # [ceil(T / SPAN), W]
    T,
    W,
    RIGHT,
    FINITE_LEFT: tl.constexpr,  # of what is not finite in left, nothing is subtracted
    SPAN: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    column_tiles = tl.cdiv(W, BC)  # one axis for groups and columns: the others end at 65,535
    group = tl.program_id(0) // column_tiles
    w = (tl.program_id(0) % column_tiles) * BC + tl.arange(0, BC)
    first = group * SPAN
    sums = tl.zeros((BC,), tl.float64)
    for t0 in range(0, tl.minimum(SPAN, T - first), BT):
        t = first + t0 + tl.arange(0, BT)
        keep = (t < T)[:, None] & (w < W)[None, :]
        part = tl.load(partials + t.to(tl.int64)[:, None] * W + w[None, :], mask=keep, other=0.0)
        sums += tl.sum(part.to(tl.float64), 0)
    if left is not None:
        outer = tl.load(left + w // RIGHT, mask=w < W, other=0.0).to(tl.float64)
        if FINITE_LEFT:
            outer = tl.where(outer - outer == 0.0, outer, 0.0)
        sums -= outer * tl.load(right + w % RIGHT, mask=w < W, other=0.0).to(tl.float64)
    place = out + group.to(tl.int64) * W + w
    tl.store(place, sums.to(out.dtype.element_ty), mask=w < W)


@triton.jit(do_not_specialize=["T", "P", "C"])
def merge_moments_kernel(
    tile_mean,  # [T, C] float64, of ROWS rows each, the last one of what is left of P
    tile_m2,  # [T, C]: sum (value - tile_mean)^2
    out,  # [ceil(T / SPAN), 2, C] float64: sum value, sum value^2
    T,
    P,
    C,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    column_tiles = tl.cdiv(C, BC)
    group = tl.program_id(0) // column_tiles
    i = (tl.program_id(0) % column_tiles) * BC + tl.arange(0, BC)
    first = group * SPAN
    total = tl.zeros((BC,), tl.float64)
    squares = tl.zeros((BC,), tl.float64)
    for t0 in range(0, tl.minimum(SPAN, T - first), BT):
        t = first + t0 + tl.arange(0, BT)
        keep = (t < T)[:, None] & (i < C)[None, :]
        place = t.to(tl.int64)[:, None] * C + i[None, :]
        count = tl.minimum(P - t.to(tl.int64) * ROWS, ROWS).to(tl.float64)[:, None]
        count = tl.where(keep, count, 0.0)
        mean = tl.load(tile_mean + place, mask=keep, other=0.0).to(tl.float64)
        m2 = tl.load(tile_m2 + place, mask=keep, other=0.0).to(tl.float64)
        # raw power sums: in float64 they lose nothing to cancellation that float32 inputs had
        total += tl.sum(count * mean, 0)
        squares += tl.sum(m2 + count * mean * mean, 0)
    place = out + group.to(tl.int64) * 2 * C + i
    tl.store(place, total, mask=i < C)
    tl.store(place + C, squares, mask=i < C)


@triton.jit(do_not_specialize=["T", "P", "C"])
def finish_moments_kernel(
    power_sums,  # [T, 2, C] float64: sum value, sum value^2
    mean,
    var,
    T,
    P,
    C,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    i = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros((BC,), tl.float64)
    squares = tl.zeros((BC,), tl.float64)
    for t0 in range(0, T, BT):
        t = t0 + tl.arange(0, BT)
        keep = (t < T)[:, None] & (i < C)[None, :]
        place = power_sums + t[:, None] * 2 * C + i[None, :]
        total += tl.sum(tl.load(place, mask=keep, other=0.0), 0)
        squares += tl.sum(tl.load(place + C, mask=keep, other=0.0), 0)
    center = total / P
    spread = squares / P - center * center
    spread = tl.maximum(spread, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(mean + i, center.to(mean.dtype.element_ty), mask=i < C)
    tl.store(var + i, spread.to(var.dtype.element_ty), mask=i < C)


def merge_sums(
    partials: Tensor,
    outer: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    finite_left: bool = False,
) -> Tensor:
    """Sum over the first dimension: partials [T, ...] -> [...].

    Args:
        outer: (left [L], right [R]); their outer product is subtracted from the sums [L, R] before rounding.
        finite_left: only where left is finite; elsewhere the sums have its infinities by themselves.
    """
    shape = partials.shape[1:]
    count, width = partials.shape[0], shape.numel()
    while True:
        groups = layout.cdiv(count, MERGE_ROWS)
        last = groups == 1
        out = layout.empty((groups, width), partials, dtype if last else torch.float64)
        left, right = outer if last and outer is not None else (None, None)
        launch(
            merge_sums_kernel,
            (layout.cdiv(width, BLOCK_COLUMNS) * groups,),
            partials,
            left,
            right,
            out,
            count,
            width,
            RIGHT=1 if right is None else right.numel(),
            FINITE_LEFT=finite_left,
            SPAN=MERGE_ROWS,
            BT=BLOCK_ROWS,
            BC=BLOCK_COLUMNS,
            num_warps=4,
        )
        if last:
            return out.view(shape)
        partials, count = out, groups


def merge_moments(tile_mean: Tensor, tile_m2: Tensor, total: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    """mean and biased variance [C] over `total` rows, from tiles [T, C] of `tile_rows` rows each."""
    count, channels = tile_mean.shape
    groups = layout.cdiv(count, MERGE_ROWS)
    power_sums = layout.empty((groups, 2, channels), tile_mean, torch.float64)
    launch(
        merge_moments_kernel,
        (layout.cdiv(channels, BLOCK_COLUMNS) * groups,),
        tile_mean,
        tile_m2,
        power_sums,
        count,
        total,
        channels,
        ROWS=tile_rows,
        SPAN=MERGE_ROWS,
        BT=BLOCK_ROWS,
        BC=BLOCK_COLUMNS,
        num_warps=4,
    )
    if groups > MERGE_ROWS:
        power_sums = merge_sums(power_sums, dtype=torch.float64)[None]
    mean, var = (layout.empty((channels,), tile_m2) for _ in range(2))
    launch(
        finish_moments_kernel,
        (layout.cdiv(channels, BLOCK_COLUMNS),),
        power_sums,
        mean,
        var,
        power_sums.shape[0],
        total,
        channels,
        BT=BLOCK_ROWS,
        BC=BLOCK_COLUMNS,
        num_warps=4,
    )
    return mean, var
