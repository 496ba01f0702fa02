"""Two of the library's ops in one call give bitwise what they give one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedres.ops.native import library

pytestmark = pytest.mark.skipif(not library.is_loaded(), reason="the compiled kernels are not built")
NATIVE = torch.ops.fusedres_native
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHANNELS, ROWS = 24, 2 * 7 * 5


def activation(seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, CHANNELS, 7, 5, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)


def vector(seed: int, device: str = "cpu") -> Tensor:
    return torch.randn(CHANNELS, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_equal(found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_statistics_and_vectors(device: str, dtype: torch.dtype, affine: bool) -> None:
    c = activation(0, device, dtype)
    parameters = (vector(1, device), vector(2, device)) if affine else (None, None)
    mean, var = NATIVE.bn_stats(c)
    vectors = NATIVE.bn_scale_shift(mean, var, *parameters, 1e-5)
    assert_equal(NATIVE.bn_stats_scale_shift(c, *parameters, 1e-5), (mean, var, *vectors))


@pytest.mark.parametrize("gate", ["mask", "sign", "none"])
@pytest.mark.parametrize("training", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("projection", [True, False], ids=["projection", "alone"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_sums_and_coefficients(
    device: str, dtype: torch.dtype, projection: bool, training: tuple[bool, bool], gate: str
) -> None:
    c, dy, other = (activation(i, device, dtype) for i in range(3))
    mean, _, invstd, scale, shift = NATIVE.bn_stats_scale_shift(c, vector(1, device), vector(2, device), 1e-5)
    moved, _, spread, sloped, _ = NATIVE.bn_stats_scale_shift(other, vector(3, device), None, 1e-5)
    mask = None
    if gate == "mask":
        _, mask = NATIVE.bn_add_relu_forward(c, scale, shift, None, None, None, True, True)
    shortcut = (other, moved) if projection else (None, None)
    reduced = dy, c, mean, scale, shift, mask, gate == "sign", *shortcut
    sums = NATIVE.bn_add_relu_backward_reduce(*reduced)
    own = NATIVE.bn_backward_coefficients(sums[0], sums[1], mean, invstd, scale, ROWS, training[0])
    side = (None, None, None)
    if projection:
        side = NATIVE.bn_backward_coefficients(sums[0], sums[2], moved, spread, sloped, ROWS, training[1])
    vectors = (spread, sloped) if projection else (None, None)
    found = NATIVE.bn_add_relu_backward_reduce_coefficients(
        *reduced, invstd, ROWS, training[0], *vectors, training[1]
    )
    assert_equal(found, (*sums, *own, *side))


c, v = activation(0), vector(0)
REDUCE = "bn_add_relu_backward_reduce_coefficients"
BAD_CALLS: dict[str, tuple[str, Callable[[], tuple[object, ...]], str]] = {
    "weight length": (
        "bn_stats_scale_shift",
        lambda: (c, v[:3], None, 1e-5),
        r"weight is \[3\].* needed contiguous \[24\]",
    ),
    "c rank": ("bn_stats_scale_shift", lambda: (v, None, None, 1e-5), r"c is \[24\], needed \[N, C, H, W\]"),
    "invstd length": (
        REDUCE,
        lambda: (c, c, v, v, v, None, True, None, None, v[:3], 1, True, None, None, False),
        r"invstd is \[3\].* needed contiguous \[24\]",
    ),
    "rows": (
        REDUCE,
        lambda: (c, c, v, v, v, None, True, None, None, v, -1, True, None, None, False),
        r"rows is -1, needed N\*H\*W",
    ),
    "half of a shortcut": (
        REDUCE,
        lambda: (c, c, v, v, v, None, True, c, v, v, 1, True, v, None, False),
        "shortcut_invstd, shortcut_scale is given in part",
    ),
    "vectors of no shortcut": (
        REDUCE,
        lambda: (c, c, v, v, v, None, True, None, None, v, 1, True, v, v, False),
        "shortcut_c is None, needed a tensor like c",
    ),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_refuses(what: str) -> None:
    op, arguments, message = BAD_CALLS[what]
    with pytest.raises(RuntimeError, match=message) as caught:
        getattr(NATIVE, op)(*arguments())
    assert f"fusedres {op}: " in str(caught.value)
