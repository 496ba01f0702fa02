"""Input gradient of a 1x1 convolution: BN backward as prologue or before it, the shortcut's gradient added."""

import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout, tiles
from fusedres.triton_kernels.bn_add_relu_backward_input import bn_add_relu_backward_input
from fusedres.triton_kernels.elementwise import activation, affine, load_vector, select_in_tile
from fusedres.triton_kernels.launch import launch
from fusedres.triton_kernels.wgmma import must_wait, wait


@triton.jit
def shortcut_gradient(dy, mask, row, first, valid, CIN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The gradient [BM, BN] in float32 that comes through the shortcut: rows from dy's and the mask's first on."""
    n = first + tl.arange(0, BN)[None, :]
    side = tl.load(dy + row * CIN + n, mask=valid & (n < CIN), other=0.0)
    if mask is not None:
        side = select_in_tile(side, mask, row, first, valid, CIN, BM, BN)
    return side.to(tl.float32)


@triton.jit(do_not_specialize=["P"])
def conv1x1_backward_input_kernel(
    dy,  # [P, COUT], gradient of the activation; dc itself where A is None
    c,  # [P, COUT], raw output of this convolution, or None with A
    scale,  # [COUT] or None: no ReLU, dz = dy
    shift,
    A,  # [COUT], dc = A*dz + B*c + K; or None: a plain product
    B,  # [COUT] or None with K: frozen statistics
    K,
    weight,  # [COUT, CIN]
    shortcut_dy,  # [P, CIN] or None
    shortcut_mask,  # packed bits over shortcut_dy, or None
    dx,  # [P, CIN]
    dc,  # [P, COUT], side output, or None with A
    P,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WAIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    column_tiles: tl.constexpr = (CIN + BN - 1) // BN
    row_tile = tl.program_id(0) // column_tiles
    column_tile = tl.program_id(0) % column_tiles
    row = tl.arange(0, BM)[:, None]
    n = column_tile * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    valid = row_tile * BM + row < P  # [BM, 1]
    valid_n = n < CIN
    base = row_tile.to(tl.int64) * BM
    # every column tile makes the same dc; the first one writes it
    written_rows = tl.where(column_tile == 0, P - row_tile * BM, 0)

    acc = tl.zeros((BM, BN), tl.float32)
    # Before a plain product of 16 bits, so that its bytes are under way together with the first operands, and the sum
    # starts from it: that costs no registers, and 16 bits lose nothing by it. A prologue's registers leave it no room.
    early: tl.constexpr = A is None and dx.dtype.element_ty != tl.float32
    side_mask = None if shortcut_mask is None else shortcut_mask + base // 8 * CIN
    if shortcut_dy is not None and early:
        acc += shortcut_gradient(
            shortcut_dy + base * CIN, side_mask, row, column_tile * BN, valid, CIN, BM, BN
        )
    for k0 in range(0, COUT, BK):
        valid_k = k0 + k < COUT
        keep = valid & valid_k[None, :]
        place = row * COUT + (k0 + k)[None, :]  # [BM, BK]
        dz = tl.load(dy + base * COUT + place, mask=keep, other=0.0)
        w_place = (k0 + k)[:, None] * CIN + n[None, :]  # [BK, BN]
        w = tl.load(weight + w_place, mask=valid_k[:, None] & valid_n[None, :], other=0.0)
        if A is None:
            acc = tl.dot(dz, w, acc, input_precision=PRECISION)
        else:
            grad = dz.to(tl.float32)
            if scale is not None or B is not None:
                ck = tl.load(c + base * COUT + place, mask=keep, other=0.0)
            if scale is not None:
                grad = tl.where(activation(ck, scale, shift, k0 + k, COUT) <= 0, 0.0, grad)
            grad = grad * load_vector(A, k0 + k, COUT)
            if B is not None:
                grad += affine(ck, B, K, k0 + k, COUT)
            grad = grad.to(dx.dtype.element_ty)
            tl.store(dc + base * COUT + place, grad, mask=(row < written_rows) & valid_k[None, :])
            acc = wait(tl.dot(grad, w, acc, input_precision=PRECISION), WAIT)

    if shortcut_dy is not None and not early:
        acc += shortcut_gradient(
            shortcut_dy + base * CIN, side_mask, row, column_tile * BN, valid, CIN, BM, BN
        )
    place = row * CIN + n[None, :]  # [BM, BN]
    tl.store(dx + base * CIN + place, acc.to(dx.dtype.element_ty), mask=valid & valid_n[None, :])


def conv1x1_backward_input(
    dy: Tensor,
    c: Tensor,
    activation: tuple[Tensor, Tensor] | None,
    coefficients: tuple[Tensor, Tensor | None, Tensor | None],
    weight: Tensor,
    shortcut_dy: Tensor | None = None,
    shortcut_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx [N, Cin, H, W] and dc [N, Cout, H, W]; dy and c like dc, not empty.

    Args:
        activation: scale and shift of the ReLU between dy and c, None without one.
        coefficients: A, B, K of `dc = A*dz + B*c + K`.
    """
    n, cout, height, width = c.shape
    cin = weight.shape[1]
    dx = layout.empty((n, cin, height, width), c)
    if tiles.dc_comes_first(cin, cout):
        tile = tiles.output_tile(tiles.CONV1X1_PLAIN_BACKWARD_INPUT, cin, cout)
        dc, _ = bn_add_relu_backward_input(dy, c, activation, coefficients)
        prologue = (dc, None, None, None, None, None, None)
        side_output = None
    else:
        tile = tiles.output_tile(tiles.CONV1X1_BACKWARD_INPUT, cin, cout)
        dc = side_output = layout.empty(tuple(c.shape), c)
        scale, shift = activation if activation is not None else (None, None)
        prologue = (layout.nhwc(dy), layout.nhwc(c), scale, shift, *coefficients)
    total = layout.rows(c)
    launch(
        conv1x1_backward_input_kernel,
        (layout.cdiv(total, tile.bm) * layout.cdiv(cin, tile.bn),),
        *prologue,
        weight.reshape(cout, cin).contiguous(),
        None if shortcut_dy is None else layout.nhwc(shortcut_dy),
        shortcut_mask,
        dx,
        side_output,
        total,
        CIN=cin,
        COUT=cout,
        PRECISION=layout.precision(c),
        WAIT=must_wait(c),
        BM=tile.bm,
        BN=tile.bn,
        BK=tile.bk,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dx, dc
