"""The native running statistics of several norms on the CPU, against torch's own batch_norm."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager
from cuda_host_list_checks import moved
from torch import Tensor

from fusedres.ops.native import library, running_stats

pytestmark = pytest.mark.skipif(not library.is_built(), reason="no compiled library in this installation")

MOST = 8  # of one launch


class Norm(NamedTuple):
    c: Tensor  # what it normalises
    running_mean: Tensor
    running_var: Tensor
    momentum: float

    @property
    def unbiased(self) -> float:
        rows = self.c.numel() // self.c.shape[1]
        return self.momentum * rows / (rows - 1)


def a_norm(i: int) -> Norm:
    channels = (17, 1, 64, 3, 130)[i % 5]
    generator = torch.Generator().manual_seed(i)
    c = torch.randn(3, channels, 4, 5, generator=generator) * 2 + 3
    running_var = torch.rand(channels, generator=generator)
    return Norm(c, torch.randn(channels, generator=generator), running_var, 0.1 + 0.8 * i / 20)


def move(norms: list[Norm], counters: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The statistics of the batches; the running ones are moved in their place."""
    rows = [n.c.double().permute(0, 2, 3, 1).flatten(0, 2) for n in norms]
    batch = [(r.mean(0).float(), r.var(0, correction=0).float()) for r in rows]
    means, variances = ([pair[i] for pair in batch] for i in range(2))
    keep, weight = [1 - n.momentum for n in norms], [n.momentum for n in norms]
    running = [n.running_mean for n in norms], [n.running_var for n in norms]
    assert running_stats.takes(*running, counters, means, variances)
    running_stats.move(*running, counters, means, variances, keep, weight, [n.unbiased for n in norms])
    return batch


def torch_moved(norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    c, mean, var = (t.to(dtype, copy=True) for t in norm[:3])
    F.batch_norm(c, mean, var, training=True, momentum=norm.momentum)
    return mean, var


@pytest.fixture(autouse=True)
def loaded() -> None:
    library.load()


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("count", [1, 2, MOST, MOST + 1, 2 * MOST + 3])
def test_running_statistics_are_those_of_batch_norm(count: int, counted: bool) -> None:
    norms = [a_norm(i) for i in range(count)]
    kept = [n._replace(running_mean=n.running_mean.clone(), running_var=n.running_var.clone()) for n in norms]
    counters = [torch.tensor(7 * i) for i in range(count)] if counted else []
    move(norms, counters)
    assert [int(c) for c in counters] == [7 * i + 1 for i in range(len(counters))]
    for i, (norm, before) in enumerate(zip(norms, kept, strict=True)):
        eager, exact = (torch_moved(before, dtype) for dtype in (torch.float32, torch.float64))
        found = norm.running_mean, norm.running_var
        for name, *values in zip(("mean", "var"), found, eager, exact, strict=True):
            assert_as_accurate_as_eager(*values, f"{name} of norm {i}")


def test_running_statistics_are_rounded_as_on_a_gpu() -> None:
    """Also those of a batch with infinities and NaN, which stay in them."""
    norms = [a_norm(i) for i in range(MOST + 1)]
    norms[0].c[0, 3, 0, 0], norms[0].c[1, 5, 2, 2] = float("inf"), float("nan")
    before = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]
    batch = move(norms, [])
    for norm, (mean, var), (batch_mean, batch_var) in zip(norms, before, batch, strict=True):
        keep = 1 - norm.momentum
        expected = moved(mean, batch_mean, keep, norm.momentum), moved(var, batch_var, keep, norm.unbiased)
        for found, wanted in zip((norm.running_mean, norm.running_var), expected, strict=True):
            assert torch.equal(found.isnan(), wanted.isnan())
            assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
    assert norms[0].running_mean[3] == float("inf") and norms[0].running_mean[5].isnan()


def test_a_norm_of_no_channels() -> None:
    none, counter, half = [torch.empty(0)], torch.tensor(3), [0.5]
    torch.ops.fusedres_native.bn_running_stats_(none, none, [counter], none, none, half, half, half)
    assert int(counter) == 4


ONES = torch.ones(8)
GOOD = {
    "running_mean": [ONES, ONES],
    "running_var": [ONES, ONES],
    "counters": [],
    "mean": [ONES, ONES],
    "var": [ONES, ONES],
    "keep": [0.9, 0.9],
    "weight": [0.1, 0.1],
    "unbiased": [0.1, 0.1],
}
BAD = {
    **{
        f"fewer in {name}": (
            {name: GOOD[name][:1]},
            rf"{name} is 1 long, needed 2; pass one for each norm",
        )
        for name in GOOD
        if name not in ("running_mean", "counters")
    },
    "fewer norms": ({"running_mean": [ONES]}, "running_var is 2 long, needed 1"),
    "fewer counters": ({"counters": [torch.tensor(1)]}, "counters is 1 long, needed 2"),
    "dtype of a running mean": (
        {"running_mean": [ONES, ONES.double()]},
        "running_mean is float64, needed float32",
    ),
    "dtype of a running variance": (
        {"running_var": [ONES.half(), ONES]},
        "running_var is float16, needed float32",
    ),
    "dtype of a mean": ({"mean": [ONES, ONES.bfloat16()]}, "mean is bfloat16, needed float32"),
    "dtype of a variance": ({"var": [ONES.double(), ONES]}, "var is float64, needed float32"),
    "dtype of a counter": (
        {"counters": [torch.tensor(1), torch.tensor(1.0)]},
        r"counters is float32 \[\], needed",
    ),
    "counters of a norm": (
        {"counters": [torch.tensor([1, 2])] * 2},
        r"counters is int64 \[2\], needed int64 \[\]",
    ),
    "channels": ({"var": [ONES, ONES[:3]]}, r"var is \[3\], needed contiguous \[8\]"),
    "stride": (
        {"mean": [torch.ones(16)[::2], ONES]},
        r"mean is \[8\] of strides \[2\], needed contiguous \[8\]",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_refuses(what: str) -> None:
    changes, message = BAD[what]
    with pytest.raises(RuntimeError, match=message) as caught:
        torch.ops.fusedres_native.bn_running_stats_(*(GOOD | changes).values())
    assert "fusedres bn_running_stats_: " in str(caught.value)
