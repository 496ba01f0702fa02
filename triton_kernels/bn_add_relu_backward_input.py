"""`dc = A*dz + B*c + K`, and the gradient of the residual, one pass over NHWC tiles."""

import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout, tiles
from fusedres.triton_kernels.elementwise import affine, load_vector, masked_gradient
from fusedres.triton_kernels.launch import launch

Coefficients = tuple[Tensor, Tensor | None, Tensor | None]  # A, B, K


@triton.jit
def apply_coefficients(dz, c, A, B, K, i, C: tl.constexpr):
    """A*dz + B*c + K in float32; dz and c [R, C], vectors at columns i, B and K None: A*dz."""
    grad = dz.to(tl.float32) * load_vector(A, i, C)
    if B is not None:
        grad += affine(c, B, K, i, C)
    return grad


@triton.jit(do_not_specialize=["N"])
def bn_add_relu_backward_input_kernel(
    dy,  # [N / WIDTH, WIDTH], also c, shortcut_c and the outputs
    c,
    scale,  # [C] or None: no ReLU to take from c's sign
    shift,
    A,  # [C]
    B,  # [C] or None with K: frozen statistics
    K,
    mask,  # packed bits, or None
    shortcut_c,  # or None
    shortcut_A,
    shortcut_B,
    shortcut_K,
    dc,
    dresidual,  # or None
    N,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    base = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS * WIDTH
    column = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, ROWS)[:, None] * WIDTH + column[None, :]  # [ROWS, COLUMNS]
    valid = (column < WIDTH)[None, :] & (place < N - base)
    i = column % C
    dz = tl.load(dy + base + place, mask=valid, other=0.0)
    ct = tl.load(c + base + place, mask=valid, other=0.0)
    bits = None if mask is None else mask + base // 8
    dz = masked_gradient(dz, ct, bits, place, valid, scale, shift, i, C)
    tl.store(dc + base + place, apply_coefficients(dz, ct, A, B, K, i, C).to(dc.dtype.element_ty), mask=valid)
    if dresidual is not None:
        if shortcut_c is not None:
            st = tl.load(shortcut_c + base + place, mask=valid, other=0.0)
            dz = apply_coefficients(dz, st, shortcut_A, shortcut_B, shortcut_K, i, C).to(dc.dtype.element_ty)
        tl.store(dresidual + base + place, dz, mask=valid)


def bn_add_relu_backward_input(
    dy: Tensor,
    c: Tensor,
    activation: tuple[Tensor, Tensor] | None,
    coefficients: Coefficients,
    mask: Tensor | None = None,
    shortcut_c: Tensor | None = None,
    shortcut_coefficients: Coefficients | None = None,
    save_dz: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dc and the gradient of the residual, if any, [N, C, H, W]; dy, c and shortcut_c like them, not empty.

    Args:
        activation: scale and shift of the ReLU whose mask is made again from c; None: `mask`, or no ReLU.
        coefficients: A, B, K of dc; shortcut_coefficients: of the projection's input gradient.
        save_dz: without a projection, whether dz itself is wanted.
    """
    dc = layout.empty(tuple(c.shape), c)
    dresidual = layout.empty(tuple(c.shape), c) if save_dz or shortcut_c is not None else None
    scale, shift = activation if activation is not None else (None, None)
    shortcut_A, shortcut_B, shortcut_K = shortcut_coefficients or (None, None, None)
    width, rows, columns = tiles.elementwise_tile(c.shape[1])
    row_tiles = layout.cdiv(layout.cdiv(c.numel(), width), rows)
    launch(
        bn_add_relu_backward_input_kernel,
        (row_tiles * layout.cdiv(width, columns),),
        layout.nhwc(dy),
        layout.nhwc(c),
        scale,
        shift,
        *coefficients,
        mask,
        None if shortcut_c is None else layout.nhwc(shortcut_c),
        shortcut_A,
        shortcut_B,
        shortcut_K,
        dc,
        dresidual,
        c.numel(),
        C=c.shape[1],
        WIDTH=width,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=tiles.ELEMENTWISE_WARPS,
    )
    return dc, dresidual
