"""Hopper's asynchronous products, where the first operand is made in registers by a prologue."""

import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout


def must_wait(x: Tensor) -> bool:
    """Whether x's device multiplies by wgmma: Hopper, compute capability 9, alone."""
    return waits_on(layout.capability(x))


def waits_on(capability: int) -> bool:
    return capability == 9


@triton.jit
def wait(acc, WAIT: tl.constexpr):
    """acc itself, with the product that makes it finished.

    wgmma reads the registers of its first operand after it was issued, and PTX leaves undefined what happens if they
    are written before it was waited for. Triton 3.6 to 3.8 leave the products of one step in flight while the next
    step's prologue writes the same registers (triton-lang/triton#9433). An empty instruction on acc, which stands
    between two steps, makes every version wait for each step; it costs no instruction of its own.
    """
    if WAIT:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc
