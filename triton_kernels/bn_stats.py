"""Batch statistics of an NHWC tensor: mean and M2 of row tiles held in registers, merged in float64."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout, tiles
from fusedres.triton_kernels.elementwise import tile_moments
from fusedres.triton_kernels.launch import launch
from fusedres.triton_kernels.merge import merge_moments


@triton.jit(do_not_specialize=["P"])
def bn_stats_kernel(
    c,  # [P, C]
    tile_mean,  # [ceil(P / ROWS), C] float64
    tile_m2,
    P,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_tiles: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    row_tile = tl.program_id(0) // column_tiles
    i = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    left = P - row_tile * ROWS
    keep = (row < left)[:, None] & (i < C)[None, :]
    tile = tl.load(c + row_tile.to(tl.int64) * ROWS * C + row[:, None] * C + i[None, :], mask=keep, other=0.0)
    mean, m2 = tile_moments(tile, row < left, tl.minimum(left, ROWS), ROWS)
    tl.store(tile_mean + row_tile.to(tl.int64) * C + i, mean, mask=i < C)
    tl.store(tile_m2 + row_tile.to(tl.int64) * C + i, m2, mask=i < C)


def bn_stats(c: Tensor) -> tuple[Tensor, Tensor]:
    """mean and biased variance [C] in float32 of c [N, C, H, W], not empty."""
    channels, total = c.shape[1], layout.rows(c)
    row_tiles = layout.cdiv(total, tiles.REDUCTION_ROWS)
    tile_mean, tile_m2 = (layout.empty((row_tiles, channels), c, t) for t in (torch.float64, torch.float32))
    launch(
        bn_stats_kernel,
        (row_tiles * layout.cdiv(channels, tiles.REDUCTION_COLUMNS),),
        layout.nhwc(c),
        tile_mean,
        tile_m2,
        total,
        C=channels,
        ROWS=tiles.REDUCTION_ROWS,
        COLUMNS=tiles.REDUCTION_COLUMNS,
        num_warps=tiles.REDUCTION_WARPS,
    )
    return merge_moments(tile_mean, tile_m2, total, tiles.REDUCTION_ROWS)
