"""1x1 convolution as a GEMM over NHWC rows: BN+ReLU prologue, statistics or BN+add+ReLU epilogue."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout, tiles
from fusedres.triton_kernels.elementwise import activation, affine, load_vector, pack_bits, relu, tile_moments
from fusedres.triton_kernels.launch import launch
from fusedres.triton_kernels.merge import merge_moments
from fusedres.triton_kernels.relu_backward import relu_mask
from fusedres.triton_kernels.wgmma import must_wait, wait


@triton.jit(do_not_specialize=["P", "H", "W", "H_OUT", "W_OUT"])
def conv1x1_forward_kernel(
    x,  # [N, H, W, CIN]
    weight,  # [COUT, CIN]
    bias,  # [COUT] or None
    in_scale,  # [CIN] or None: no prologue
    in_shift,
    scale,  # [COUT] or None: raw output
    shift,
    residual,  # [P, COUT] or None
    residual_scale,  # [COUT] or None: the residual as it is
    residual_shift,
    y,  # [P, COUT]
    mask,  # [P, COUT // 8] or None
    tile_mean,  # [ceil(P / BM), COUT] float64, or None
    tile_m2,
    P,
    H,
    W,
    H_OUT,
    W_OUT,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WAIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # column tiles of one row tile run side by side, so that x comes from L2 for all but the first
    column_tiles: tl.constexpr = (COUT + BN - 1) // BN
    row_tile = tl.program_id(0) // column_tiles
    rows = row_tile * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % column_tiles) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    valid = rows < P
    valid_n = n < COUT
    if STRIDE == 1:
        x_row = rows
    else:
        image_line = rows // W_OUT
        line = (image_line // H_OUT) * H + (image_line % H_OUT) * STRIDE
        x_row = line * W + (rows % W_OUT) * STRIDE
    x_tile = x + x_row.to(tl.int64)[:, None] * CIN + k[None, :]  # [BM, BK]
    w_tile = weight + n[None, :] * CIN + k[:, None]  # [BK, BN]

    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, CIN, BK):
        valid_k = k0 + k < CIN
        a = tl.load(x_tile + k0, mask=valid[:, None] & valid_k[None, :], other=0.0)
        w = tl.load(w_tile + k0, mask=valid_k[:, None] & valid_n[None, :], other=0.0)
        if in_scale is not None:
            a = activation(a, in_scale, in_shift, k0 + k, CIN)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        if in_scale is not None:
            acc = wait(acc, WAIT)

    base = row_tile.to(tl.int64) * BM * COUT  # of the output tile; offsets inside it fit 32 bits
    inside = tl.arange(0, BM)[:, None] * COUT + n[None, :]  # [BM, BN]
    keep = valid[:, None] & valid_n[None, :]
    if bias is not None:
        acc += load_vector(bias, n, COUT).to(tl.float32)
    if scale is not None:
        acc = affine(acc, scale, shift, n, COUT)
    if residual is not None:
        r = tl.load(residual + base + inside, mask=keep, other=0.0)
        acc += (
            r.to(tl.float32) if residual_scale is None else affine(r, residual_scale, residual_shift, n, COUT)
        )
    if RELU:
        acc = relu(acc)
    out = acc.to(y.dtype.element_ty)
    tl.store(y + base + inside, out, mask=keep)
    if mask is not None:
        columns = (tl.program_id(0) % column_tiles) * (BN // 8) + tl.arange(0, BN // 8)
        byte = tl.arange(0, BM)[:, None] * (COUT // 8) + columns[None, :]
        keep_byte = valid[:, None] & (columns < COUT // 8)[None, :]
        tl.store(mask + base // 8 + byte, pack_bits(out, BM, BN), mask=keep_byte)
    if tile_mean is not None:
        # Read back from the cache, once every thread has stored. A product leaves a thread few rows of many columns, so
        # that each of its columns would be added across threads; as memory has it, a thread has many rows of 8 columns.
        tl.debug_barrier()
        stored = tl.load(y + base + inside, mask=keep, other=0.0)
        mean, m2 = tile_moments(stored, valid, tl.minimum(P - row_tile * BM, BM), BM)
        tl.store(tile_mean + row_tile.to(tl.int64) * COUT + n, mean, mask=valid_n)
        tl.store(tile_m2 + row_tile.to(tl.int64) * COUT + n, m2, mask=valid_n)


def conv1x1_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    relu: bool = False,
    save_mask: bool = False,
    save_stats: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y [N, Cout, H', W'], its packed mask, its mean and variance [Cout]; x [N, Cin, H, W], not empty."""
    n, cin, height, width = x.shape
    cout = weight.shape[0]
    h_out, w_out = (height - 1) // stride + 1, (width - 1) // stride + 1
    y = layout.empty((n, cout, h_out, w_out), x)
    total = layout.rows(y)
    tile = tiles.output_tile(tiles.CONV1X1_FORWARD, cout, cin)
    row_tiles = layout.cdiv(total, tile.bm)
    # a row's bits end at a byte only where cout is a multiple of 8; else they are packed from y
    mask = layout.empty((y.numel() // 8,), x, torch.uint8) if save_mask and cout % 8 == 0 else None
    tile_mean, tile_m2 = (
        layout.empty((row_tiles, cout), x, dtype) if save_stats else None
        for dtype in (torch.float64, torch.float32)
    )
    launch(
        conv1x1_forward_kernel,
        (row_tiles * layout.cdiv(cout, tile.bn),),
        layout.nhwc(x),
        weight.reshape(cout, cin).contiguous(),
        bias,
        in_scale,
        in_shift,
        scale,
        shift,
        None if residual is None else layout.nhwc(residual),
        residual_scale,
        residual_shift,
        y,
        mask,
        tile_mean,
        tile_m2,
        total,
        height,
        width,
        h_out,
        w_out,
        CIN=cin,
        COUT=cout,
        STRIDE=stride,
        RELU=relu,
        PRECISION=layout.precision(x),
        WAIT=must_wait(x),
        BM=tile.bm,
        BN=tile.bn,
        BK=tile.bk,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if save_mask and mask is None:
        mask = relu_mask(y)
    if tile_mean is None or tile_m2 is None:
        return y, mask, None, None
    return y, mask, *merge_moments(tile_mean, tile_m2, total, tile.bm)
