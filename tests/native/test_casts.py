"""The weights of a block in another dtype together: each as torch casts it, whatever the others are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fusedres.ops.native import casts, library

pytestmark = pytest.mark.skipif(not library.is_loaded(), reason="the compiled kernels are not built")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A kernel that torch computes stands in; a number of tensors for each launch."""
    found: list[int] = []

    def cast(to: list[Tensor], given: list[Tensor]) -> None:
        found.append(len(to))
        assert len({t.dtype for t in to}) == len({t.dtype for t in given}) == 1
        for a, b in zip(to, given, strict=True):
            assert a.stride() == b.stride()
            a.copy_(b)

    monkeypatch.setattr(casts, "takes", lambda t, dtype: t.dim() != 3)
    implementation = torch.library.Library("fusedres_native", "IMPL")
    implementation.impl("cast_", cast, "CPU")
    yield found
    implementation._destroy()


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(5),
        torch.randn(6, dtype=torch.bfloat16),
        torch.randn(2, 3, 4),
        torch.randn(7, dtype=torch.float16),
        torch.randn(8, 4, 1, 1),
    ]


def test_each_is_cast_in_its_place_and_all_of_a_dtype_at_once(calls: list[int]) -> None:
    given = tensors()
    found = casts.cast(given, torch.bfloat16)
    for a, t in zip(found, given, strict=True):
        expected = t.to(torch.bfloat16)
        assert torch.equal(a, expected) and a.stride() == expected.stride()
    assert found[2] is given[2]  # of that dtype already
    assert sorted(calls) == [1, 3]  # the one of three dimensions is left to torch


def test_on_the_cpu_torch_casts() -> None:
    given = tensors()
    assert not any(casts.takes(t, torch.bfloat16) for t in given)
    for a, t in zip(casts.cast(given, torch.float32), given, strict=True):
        assert torch.equal(a, t.to(torch.float32))


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [0, 1, 7, 16, 33, 100_003])
def test_the_cpu_s_kernel_rounds_as_torch(numel: int, source: torch.dtype, to: torch.dtype) -> None:
    """What a stand-in for a GPU runs; more tensors than one launch takes."""
    generator = torch.Generator().manual_seed(numel)
    given = [torch.randn(numel, generator=generator).to(source) for _ in range(20)]
    for i, value in enumerate((float("inf"), -float("inf"), float("nan"), 1e-40, 3.39e38, -0.0)):
        given[i][:1] = value
    found = [torch.empty_like(t, dtype=to) for t in given]
    torch.ops.fusedres_native.cast_(found, given)
    for a, t in zip(found, given, strict=True):
        assert torch.equal(a.nan_to_num(5), t.to(to).nan_to_num(5)) and torch.equal(a.isnan(), t.isnan())


@pytest.mark.parametrize(
    ("to", "source", "problem"),
    [
        ([torch.ones(3)], [], "from is 0 tensors, needed 1"),
        ([torch.ones(3)], [torch.ones(4)], "from is \\[4\\], needed \\[3\\]"),
        ([torch.ones(3)], [torch.ones(6)[::2]], "of strides \\[2\\]"),
        ([torch.ones(3)], [torch.ones(3, dtype=torch.float64)], "float64, needed float32 or bfloat16"),
        ([torch.ones(3)] * 2, [torch.ones(3), torch.ones(3).bfloat16()], "bfloat16, needed float32"),
    ],
)
def test_what_cannot_be_cast_is_refused(to: list[Tensor], source: list[Tensor], problem: str) -> None:
    with pytest.raises(RuntimeError, match=problem):
        torch.ops.fusedres_native.cast_(to, source)
