"""`y = relu(scale*c + shift + residual)` and its packed mask, one pass over NHWC tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout, tiles
from fusedres.triton_kernels.elementwise import affine, pack_bits, relu
from fusedres.triton_kernels.launch import launch


@triton.jit(do_not_specialize=["N"])
def bn_add_relu_forward_kernel(
    c,  # [N / WIDTH, WIDTH], also residual and y
    scale,  # [C]
    shift,
    residual,  # or None
    residual_scale,  # [C] or None: the residual as it is
    residual_shift,
    y,
    mask,  # [N / 8] or None
    N,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    base = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS * WIDTH
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    place = row * WIDTH + column[None, :]  # [ROWS, COLUMNS]
    valid = (column < WIDTH)[None, :] & (place < N - base)
    i = column % C
    z = affine(tl.load(c + base + place, mask=valid, other=0.0), scale, shift, i, C)
    if residual is not None:
        r = tl.load(residual + base + place, mask=valid, other=0.0)
        z += r.to(tl.float32) if residual_scale is None else affine(r, residual_scale, residual_shift, i, C)
    if RELU:
        z = relu(z)
    out = z.to(y.dtype.element_ty)
    tl.store(y + base + place, out, mask=valid)
    if mask is not None:
        bits = tl.where(valid, out, 0.0).to(out.dtype)  # bits past the last element are 0
        byte_column = (tl.program_id(0) % column_tiles) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
        byte = row * (WIDTH // 8) + byte_column[None, :]
        keep = (byte_column < WIDTH // 8)[None, :] & (byte * 8 < N - base)
        tl.store(mask + base // 8 + byte, pack_bits(bits, ROWS, COLUMNS), mask=keep)


def bn_add_relu_forward(
    c: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    relu: bool = True,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y [N, C, H, W] and its packed mask; c and residual like y, not empty."""
    y = layout.empty(tuple(c.shape), c)
    mask = layout.empty((layout.cdiv(c.numel(), 8),), c, torch.uint8) if save_mask else None
    width, rows, columns = tiles.elementwise_tile(c.shape[1])
    row_tiles = layout.cdiv(layout.cdiv(c.numel(), width), rows)
    launch(
        bn_add_relu_forward_kernel,
        (row_tiles * layout.cdiv(width, columns),),
        layout.nhwc(c),
        scale,
        shift,
        None if residual is None else layout.nhwc(residual),
        residual_scale,
        residual_shift,
        y,
        mask,
        c.numel(),
        C=c.shape[1],
        WIDTH=width,
        RELU=relu,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=tiles.ELEMENTWISE_WARPS,
    )
    return y, mask
