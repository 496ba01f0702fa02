"""The stem: BN, ReLU and max-pooling in one pass, and backward by gathering over the saved window places."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout, tiles
from fusedres.triton_kernels.bn_add_relu_backward_input import Coefficients, apply_coefficients
from fusedres.triton_kernels.elementwise import activation, column_sums, load_vector
from fusedres.triton_kernels.launch import launch
from fusedres.triton_kernels.merge import merge_sums

NO_GRADIENT = tl.constexpr(255)  # index of a window whose maximum is not positive


@triton.jit(do_not_specialize=["P", "H", "W", "H_OUT", "W_OUT"])
def bn_relu_maxpool_forward_kernel(
    c,  # [N, H, W, C]
    scale,  # [C]
    shift,
    y,  # [P, C], P = N*H_OUT*W_OUT
    indices,  # [P, C]
    P,
    H,
    W,
    H_OUT,
    W_OUT,
    C: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_tiles: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // column_tiles) * ROWS + tl.arange(0, ROWS)
    i = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    image = row // W_OUT // H_OUT
    top = row // W_OUT % H_OUT * STRIDE - PADDING
    left = row % W_OUT * STRIDE - PADDING
    best = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    place = tl.zeros((ROWS, COLUMNS), tl.int32)
    for kh in tl.static_range(KERNEL):
        for kw in tl.static_range(KERNEL):
            h, w = top + kh, left + kw
            inside = (row < P) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            keep = inside[:, None] & (i < C)[None, :]
            source = ((image * H + h) * W + w).to(tl.int64)[:, None] * C + i[None, :]
            a = activation(tl.load(c + source, mask=keep, other=0.0), scale, shift, i, C).to(tl.float32)
            # torch's order: the first maximum, but the last NaN
            better = keep & ((a > best) | (a != a))
            best = tl.where(better, a, best)
            place = tl.where(better, kh * KERNEL + kw, place)
    place = tl.where(best <= 0, NO_GRADIENT, place)
    keep = (row < P)[:, None] & (i < C)[None, :]
    target = row.to(tl.int64)[:, None] * C + i[None, :]
    tl.store(y + target, best.to(y.dtype.element_ty), mask=keep)
    tl.store(indices + target, place.to(tl.uint8), mask=keep)


@triton.jit
def unpool(
    dy,  # [N, H_OUT, W_OUT, C]
    indices,
    row,  # rows of the input [N, H, W], as a tile
    i,  # channels
    keep,  # [ROWS, COLUMNS]
    H,
    W,
    H_OUT,
    W_OUT,
    C: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dz [ROWS, COLUMNS] in float32: per input element, dy of the windows it is the maximum of."""
    windows: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    image = row // W // H
    h, w = row // W % H + PADDING, row % W + PADDING
    dz = tl.zeros((ROWS, COLUMNS), tl.float32)
    for up in tl.static_range(windows):
        for back in tl.static_range(windows):
            oh, ow = h // STRIDE - up, w // STRIDE - back
            kh, kw = h - oh * STRIDE, w - ow * STRIDE
            inside = (oh >= 0) & (oh < H_OUT) & (kh < KERNEL) & (ow >= 0) & (ow < W_OUT) & (kw < KERNEL)
            source = ((image * H_OUT + oh) * W_OUT + ow).to(tl.int64)[:, None] * C + i[None, :]
            valid = keep & inside[:, None]
            index = tl.load(indices + source, mask=valid, other=255).to(tl.int32)
            hit = valid & (index == (kh * KERNEL + kw)[:, None])
            dz += tl.load(dy + source, mask=hit, other=0.0).to(tl.float32)
    return dz


@triton.jit(do_not_specialize=["P", "H", "W", "H_OUT", "W_OUT"])
def bn_relu_maxpool_backward_kernel(
    dy,  # [N, H_OUT, W_OUT, C]
    indices,
    c,  # [P, C], P = N*H*W
    mean,  # [C], for the sums
    tile_sums,  # [ceil(P / ROWS), 2, C] or None
    A,  # [C], for dc
    B,
    K,
    dc,  # [P, C] or None
    P,
    H,
    W,
    H_OUT,
    W_OUT,
    C: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_tiles: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    row_tile = tl.program_id(0) // column_tiles
    row = row_tile * ROWS + tl.arange(0, ROWS)
    i = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    keep = (row < P)[:, None] & (i < C)[None, :]
    dz = unpool(dy, indices, row, i, keep, H, W, H_OUT, W_OUT, C, KERNEL, STRIDE, PADDING, ROWS, COLUMNS)
    target = row.to(tl.int64)[:, None] * C + i[None, :]
    ct = tl.load(c + target, mask=keep, other=0.0)
    if tile_sums is not None:
        centered = tl.where(keep, ct.to(tl.float32) - load_vector(mean, i, C), 0.0)
        sums = tile_sums + row_tile.to(tl.int64) * 2 * C + i
        tl.store(sums, column_sums(dz, ROWS), mask=i < C)
        tl.store(sums + C, column_sums(dz * centered, ROWS), mask=i < C)
    if dc is not None:
        tl.store(dc + target, apply_coefficients(dz, ct, A, B, K, i, C).to(dc.dtype.element_ty), mask=keep)


def pooled(size: int, kernel_size: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel_size) // stride + 1


def bn_relu_maxpool_forward(
    c: Tensor, scale: Tensor, shift: Tensor, kernel_size: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """y and indices [N, C, H', W'] of c [N, C, H, W], neither empty."""
    n, channels, height, width = c.shape
    h_out, w_out = (pooled(size, kernel_size, stride, padding) for size in (height, width))
    y = layout.empty((n, channels, h_out, w_out), c)
    indices = layout.empty(tuple(y.shape), c, torch.uint8)
    grid = (layout.cdiv(layout.rows(y), tiles.POOL_ROWS) * layout.cdiv(channels, tiles.POOL_COLUMNS),)
    launch(
        bn_relu_maxpool_forward_kernel,
        grid,
        layout.nhwc(c),
        scale,
        shift,
        y,
        indices,
        layout.rows(y),
        height,
        width,
        h_out,
        w_out,
        C=channels,
        KERNEL=kernel_size,
        STRIDE=stride,
        PADDING=padding,
        ROWS=tiles.POOL_ROWS,
        COLUMNS=tiles.POOL_COLUMNS,
        num_warps=tiles.POOL_WARPS,
    )
    return y, indices


def _backward(
    gradient: tuple[Tensor, Tensor, Tensor],
    reduction: tuple[Tensor | None, Tensor | None],
    application: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    pool: tuple[int, int, int],
    rows: int,
) -> None:
    """Launches the backward kernel: (dy, indices, c), (mean, tile_sums), (A, B, K, dc), window, tile rows."""
    dy, indices, c = gradient
    kernel_size, stride, padding = pool
    _, channels, height, width = c.shape
    grid = (layout.cdiv(layout.rows(c), rows) * layout.cdiv(channels, tiles.POOL_COLUMNS),)
    launch(
        bn_relu_maxpool_backward_kernel,
        grid,
        layout.nhwc(dy),
        layout.nhwc(indices),
        layout.nhwc(c),
        *reduction,
        *application,
        layout.rows(c),
        height,
        width,
        *dy.shape[2:],
        C=channels,
        KERNEL=kernel_size,
        STRIDE=stride,
        PADDING=padding,
        ROWS=rows,
        COLUMNS=tiles.POOL_COLUMNS,
        num_warps=tiles.POOL_WARPS,
    )


def bn_relu_maxpool_backward_reduce(
    dy: Tensor, indices: Tensor, c: Tensor, mean: Tensor, kernel_size: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """`sum dz` and `sum dz*(c - mean)` [C] in float32; dy and indices [N, C, H', W'], c [N, C, H, W]."""
    row_tiles = layout.cdiv(layout.rows(c), tiles.POOL_ROWS)
    tile_sums = layout.empty((row_tiles, 2, c.shape[1]), c, torch.float32)
    pool = (kernel_size, stride, padding)
    _backward((dy, indices, c), (mean, tile_sums), (None, None, None, None), pool, tiles.POOL_ROWS)
    sums = merge_sums(tile_sums)
    return sums[0], sums[1]


def bn_relu_maxpool_backward_input(
    dy: Tensor,
    indices: Tensor,
    c: Tensor,
    coefficients: Coefficients,
    kernel_size: int,
    stride: int,
    padding: int,
) -> Tensor:
    """dc [N, C, H, W]; dy and indices [N, C, H', W'], c like dc."""
    dc = layout.empty(tuple(c.shape), c)
    pool = (kernel_size, stride, padding)
    _backward((dy, indices, c), (None, None), (*coefficients, dc), pool, tiles.POOL_ROWS)
    return dc
