"""Statistics of a 1x1 convolution's output from the moments of its input: `W m + bias`, `diag(W S W^T)`, in float64."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.triton_kernels import layout, tiles
from fusedres.triton_kernels.launch import launch


@triton.jit
def gram_output_stats_kernel(
    weight,  # [COUT, CIN]
    products,  # [COUT, CIN] float64: W S
    bias,  # [COUT] or None
    m,  # [CIN]
    mean,  # [COUT], out
    var,  # [COUT], out
    center,  # [CIN], out: m as a value of weight's dtype
    CIN,
    COUT,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    o = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    row = o.to(tl.int64)[:, None] * CIN
    written = tl.where(tl.program_id(0) == 0, CIN, 0)  # of center, by the first program
    first = tl.zeros((BM,), tl.float64)
    second = tl.zeros((BM,), tl.float64)
    for k0 in range(0, CIN, BK):
        keep = (o < COUT)[:, None] & (k0 + k < CIN)[None, :]
        place = row + (k0 + k)[None, :]
        w = tl.load(weight + place, mask=keep, other=0.0).to(tl.float64)
        mk = tl.load(m + k0 + k, mask=k0 + k < CIN, other=0.0)
        first += tl.sum(w * mk.to(tl.float64)[None, :], 1)
        second += tl.sum(w * tl.load(products + place, mask=keep, other=0.0), 1)
        tl.store(
            center + k0 + k,
            mk.to(weight.dtype.element_ty).to(center.dtype.element_ty),
            mask=k0 + k < written,
        )
    if bias is not None:
        first += tl.load(bias + o, mask=o < COUT, other=0.0).to(tl.float64)
    second = tl.maximum(second, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(mean + o, first.to(mean.dtype.element_ty), mask=o < COUT)
    tl.store(var + o, second.to(var.dtype.element_ty), mask=o < COUT)


def gram_output_stats(
    weight: Tensor, bias: Tensor | None, m: Tensor, S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """mean, var [Cout], center [Cin], float32; weight [Cout, Cin, 1, 1], bias [Cout], m [Cin], S [Cin, Cin]."""
    cout, cin = weight.shape[:2]
    mean, var = (layout.empty((cout,), m) for _ in range(2))
    center = layout.empty((cin,), m)
    rows, columns = tiles.ALGEBRA_ROWS
    launch(
        gram_output_stats_kernel,
        (layout.cdiv(cout, rows),),
        weight,
        torch.mm(weight.view(cout, cin).double(), S.double()),
        bias,
        m,
        mean,
        var,
        center,
        CIN=cin,
        COUT=cout,
        BM=rows,
        BK=columns,
        num_warps=4,
    )
    return mean, var, center
