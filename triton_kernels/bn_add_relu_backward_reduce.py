"""The channel sums of BN's backward: `sum dz`, `sum dz*(c - mean)`, the latter for a projection too."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout, tiles
from fusedres.triton_kernels.elementwise import column_sums, load_vector, masked_gradient
from fusedres.triton_kernels.launch import launch
from fusedres.triton_kernels.merge import merge_sums


@triton.jit(do_not_specialize=["P"])
def bn_add_relu_backward_reduce_kernel(
    dy,  # [P, C]
    c,  # [P, C]
    mean,  # [C]
    scale,  # [C] or None: no ReLU to take from c's sign
    shift,
    mask,  # packed bits, or None
    shortcut_c,  # [P, C] or None
    shortcut_mean,
    tile_sums,  # [ceil(P / ROWS), SUMS, C]
    P,
    C: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_tiles: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    row_tile = (tl.program_id(0) // column_tiles).to(tl.int64)
    i = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)[:, None]
    base = row_tile * ROWS * C
    place = row * C + i[None, :]  # [ROWS, COLUMNS]
    valid = (row < P - row_tile * ROWS) & (i < C)[None, :]
    dz = tl.load(dy + base + place, mask=valid, other=0.0)
    ct = tl.load(c + base + place, mask=valid, other=0.0)
    # ROWS is a multiple of 8, so a tile starts at bit 0 of a byte for any channel count
    bits = None if mask is None else mask + base // 8
    dz = masked_gradient(dz, ct, bits, place, valid, scale, shift, i, C).to(tl.float32)
    sums = tile_sums + row_tile * SUMS * C + i
    tl.store(sums, column_sums(dz, ROWS), mask=i < C)
    centered = tl.where(valid, ct.to(tl.float32) - load_vector(mean, i, C), 0.0)
    tl.store(sums + C, column_sums(dz * centered, ROWS), mask=i < C)
    if shortcut_c is not None:
        st = tl.load(shortcut_c + base + place, mask=valid, other=0.0).to(tl.float32)
        centered = tl.where(valid, st - load_vector(shortcut_mean, i, C), 0.0)
        tl.store(sums + 2 * C, column_sums(dz * centered, ROWS), mask=i < C)


def bn_add_relu_backward_reduce(
    dy: Tensor,
    c: Tensor,
    mean: Tensor,
    activation: tuple[Tensor, Tensor] | None,
    mask: Tensor | None = None,
    shortcut_c: Tensor | None = None,
    shortcut_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The two or three sums [C] in float32; dy, c and shortcut_c [N, C, H, W], not empty.

    Args:
        activation: scale and shift of the ReLU whose mask is made again from c; None: `mask`, or no ReLU.
    """
    channels, total = c.shape[1], layout.rows(c)
    scale, shift = activation if activation is not None else (None, None)
    count = 2 if shortcut_c is None else 3
    row_tiles = layout.cdiv(total, tiles.REDUCTION_ROWS)
    tile_sums = layout.empty((row_tiles, count, channels), c, torch.float32)
    launch(
        bn_add_relu_backward_reduce_kernel,
        (row_tiles * layout.cdiv(channels, tiles.REDUCTION_COLUMNS),),
        layout.nhwc(dy),
        layout.nhwc(c),
        mean,
        scale,
        shift,
        mask,
        None if shortcut_c is None else layout.nhwc(shortcut_c),
        shortcut_mean,
        tile_sums,
        total,
        C=channels,
        SUMS=count,
        ROWS=tiles.REDUCTION_ROWS,
        COLUMNS=tiles.REDUCTION_COLUMNS,
        num_warps=tiles.REDUCTION_WARPS,
    )
    sums = merge_sums(tile_sums)
    return sums[0], sums[1], None if shortcut_c is None else sums[2]
