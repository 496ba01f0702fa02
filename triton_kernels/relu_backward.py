"""The packed mask by itself: packing it from an output, and passing a gradient through it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout
from fusedres.triton_kernels.elementwise import pack_bits, select_by_mask
from fusedres.triton_kernels.launch import launch

BLOCK_BYTES = 128  # 1024 elements a program: 8 a thread, one 16-byte load of a 2-byte dtype


@triton.jit(do_not_specialize=["N"])
def relu_mask_kernel(y, mask, N, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    element = byte[:, None] * 8 + tl.arange(0, 8)[None, :]  # [BYTES, 8]
    value = tl.load(y + element, mask=element < N, other=0.0)
    bits = pack_bits(value, BYTES, 8).reshape(BYTES)
    tl.store(mask + byte, bits, mask=byte * 8 < N)


@triton.jit(do_not_specialize=["N"])
def relu_backward_kernel(dy, mask, dz, N, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = element < N
    value = select_by_mask(tl.load(dy + element, mask=valid, other=0.0), mask, element, valid)
    tl.store(dz + element, value, mask=valid)


def relu_mask(y: Tensor) -> Tensor:
    """Packed bits `not (y <= 0)` of y [N, C, H, W]."""
    mask = layout.empty((layout.cdiv(y.numel(), 8),), y, torch.uint8)
    grid = (layout.cdiv(mask.numel(), BLOCK_BYTES),)
    launch(relu_mask_kernel, grid, layout.nhwc(y), mask, y.numel(), BYTES=BLOCK_BYTES, num_warps=4)
    return mask


def relu_backward(dy: Tensor, mask: Tensor) -> Tensor:
    """`dz = where(mask, dy, 0)` [N, C, H, W]."""
    dz = layout.empty(tuple(dy.shape), dy)
    block = 8 * BLOCK_BYTES
    launch(
        relu_backward_kernel,
        (layout.cdiv(dy.numel(), block),),
        layout.nhwc(dy),
        mask,
        dz,
        dy.numel(),
        BLOCK=block,
        num_warps=4,
    )
    return dz
