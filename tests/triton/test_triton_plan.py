"""Launches on tensors of more than 2^31 elements: what the kernels are given, with nothing allocated or launched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from counted_bytes import META_TRITON
from triton.runtime import jit

from fusedres.ops.contract import RAW_OPS, BatchNormGrads, BatchNormVectors
from fusedres.ops.triton_reasons import MAX_ROWS

INT32 = 2**31
# elements, which may be counted in 64 bits; everything else is a 32-bit number in the kernels
ELEMENTS = ("N",)
# offsets inside the share of one program, which are 32-bit: rows and channels that bound them
WITHIN = {
    "bn_stats": lambda k: k["ROWS"] * k["C"],
    "bn_add_relu_forward": lambda k: k["ROWS"] * k["WIDTH"],
    "bn_add_relu_backward_reduce": lambda k: k["ROWS"] * k["C"],
    "bn_add_relu_backward_input": lambda k: k["ROWS"] * k["WIDTH"],
    "conv1x1_forward": lambda k: max(k["BM"] * k["COUT"], k["CIN"] * k["COUT"]),
    "conv1x1_backward_weight": lambda k: k["ROWS"] * max(k["CIN"], k["COUT"]),
    "conv1x1_backward_input": lambda k: max(k["BM"], k["CIN"]) * max(k["COUT"], k["CIN"]),
    "conv1x1_gram_backward_input": lambda k: max(k["BM"], 2 * k["CIN"]) * max(k["COUT"], k["CIN"]),
    "gram": lambda k: k["ROWS"] * k["CIN"],
}


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """Name, grid and arguments of every launch."""
    found = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | options
        found.append((kernel.__name__.removesuffix("_kernel"), grid, named))

    monkeypatch.setattr(jit.JITFunction, "run", run)
    return found


def wide(channels: int, side: int = 4096) -> torch.Tensor:
    """A meta tensor of 3 * side^2 * channels elements."""
    shape = (3, channels, side, side)
    return torch.empty(shape, device="meta", dtype=torch.bfloat16, memory_format=torch.channels_last)


def longest(channels: int, step: int) -> torch.Tensor:
    """A meta tensor of nearly as many rows as are served, or of one in step^2 of them."""
    shape = (MAX_ROWS // 2**16, channels, 2**8 // step, 2**8 // step)
    return torch.empty(shape, device="meta", dtype=torch.bfloat16, memory_format=torch.channels_last)


def vector(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def call(op: str) -> None:
    """One call of `op` with 256 channels at the wide end and 64 at the narrow one."""
    narrow, c = wide(64), wide(256)
    v64, v256 = (BatchNormVectors(*(vector(n) for _ in range(5))) for n in (64, 256))
    g256 = BatchNormGrads(*(vector(256) for _ in range(5)))
    mask = torch.empty(c.numel() // 8, device="meta", dtype=torch.uint8)
    weight = torch.empty(256, 64, 1, 1, device="meta", dtype=torch.bfloat16)
    long, pooled = longest(8, 1), longest(8, 2)
    indices, v8 = (
        torch.empty_like(pooled, dtype=torch.uint8),
        BatchNormVectors(*(vector(8) for _ in range(5))),
    )
    moments = vector(256, 64), vector(64, 64), vector(64), vector(64)
    gram = vector(64), vector(64, 64), vector(64)
    calls: dict[str, tuple[Any, ...]] = {
        "bn_stats": (c,),
        "bn_add_relu_forward": (c, v256.scale, v256.shift, c, None, None, True, True),
        "bn_add_relu_backward_reduce": (c, c, v256, mask, False),
        "bn_add_relu_backward_input": (c, c, v256, g256, mask, False, None, None, True),
        "relu_backward": (c, mask),
        "bn_relu_maxpool_forward": (c, v256.scale, v256.shift, 3, 2, 1),
        "bn_relu_maxpool_backward_reduce": (pooled, indices, long, v8, 2, 2, 0),
        "conv1x1_forward": (narrow, weight, None, 1, v64.scale, v64.shift, v256.scale, v256.shift, c),
        "gram": (c, v256.scale, v256.shift),
        "gram_output_stats": (weight, None, vector(64), vector(64, 64)),
        "gram_backward_coefficients": (vector(256, 64), vector(256), weight, None, v256, 2**31 - 1, *gram),
        "conv1x1_backward_weight": (c, mask, narrow, v64.scale, v64.shift, v64.mean),
        "conv1x1_gram_backward_input": (c, mask, narrow, v64, *moments),
        "conv1x1_backward_input": (c, c, v256, g256, weight, True, narrow, None),
    }
    record = RAW_OPS[op](*calls[op])
    assert META_TRITON.reason(record) is None
    META_TRITON(record)


WEIGHTS = ("gram_output_stats", "gram_backward_coefficients")
OTHERS = ("relu_backward", "bn_relu_maxpool_forward", "bn_relu_maxpool_backward_reduce")


@pytest.mark.parametrize("op", [*WITHIN, *WEIGHTS, *OTHERS])
def test_numbers_fit_their_width(op, launches):
    assert wide(256).numel() > 4 * INT32
    call(op)
    assert launches
    for kernel, grid, named in launches:
        assert 0 < math.prod(grid) < INT32, kernel
        assert all(programs < 2**16 for programs in grid[1:]), kernel
        for name, value in named.items():
            if isinstance(value, int) and name not in ELEMENTS:
                assert value < INT32, (kernel, name)
        if kernel in WITHIN:
            assert WITHIN[kernel](named) < INT32, kernel


def test_the_recorder_sees_a_launch(launches):
    """The counter-test: without the launches' arguments none of this would be looked at."""
    call("bn_stats")
    assert launches[0][0] == "bn_stats" and launches[0][2]["P"] == 3 * 4096**2
