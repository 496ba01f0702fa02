"""The smallest kernel: whether Triton can compile, load and run anything at all on a device."""

import torch
import triton
import triton.language as tl

WRITTEN = 1


@triton.jit
def probe_kernel(out, VALUE: tl.constexpr):
    tl.store(out, VALUE)


def probe(device: torch.device) -> int:
    """What the kernel wrote on that device: WRITTEN where it ran."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    probe_kernel[(1,)](out, VALUE=WRITTEN, num_warps=1)
    return int(out.item())
