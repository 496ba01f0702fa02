"""The native statistics of a batch at values that eager PyTorch's BatchNorm2d takes."""

import math

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from torch import nn

from fusedres.ops.contract import BnStats
from fusedres.ops.native import functions, library
from fusedres.ops.reference import REFERENCE

pytestmark = pytest.mark.skipif(not library.is_built(), reason="no compiled library in this installation")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("ops", [functions.NATIVE, REFERENCE], ids=["native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_infinities_are_those_of_eager(ops, dtype):
    """The mean of a channel with an infinity is infinite in torch's BatchNorm2d on the CPU, at any row."""
    inf, nan = math.inf, math.nan
    bad = (inf,), (-inf,), (nan,), (inf, inf), (inf, -inf), (nan, inf)
    for rows in (3, 50, 3000):
        c = torch.randn(rows, 8, 1, 1).to(DTYPES[dtype], memory_format=torch.channels_last)
        for values in bad:
            for first in {0, 1, rows // 2, rows - len(values)}:
                poisoned = c.clone()
                poisoned[first : first + len(values), 3, 0, 0] = torch.tensor(values, dtype=c.dtype)
                bn = torch.nn.BatchNorm2d(8, momentum=1.0)
                bn(poisoned)
                mean, var = ops(BnStats(poisoned))
                place = f"{values} at {first} of {rows}"
                assert torch.equal(mean[3].nan_to_num(nan=0.0), bn.running_mean[3].nan_to_num(nan=0.0)), place
                assert var[3].isnan() and bn.running_var[3].isnan(), place


def eager_statistics(c):
    """Mean and biased variance as BatchNorm2d finds them."""
    bn = nn.BatchNorm2d(c.shape[1], momentum=1.0)
    bn(c)
    rows = c.numel() // c.shape[1]
    return bn.running_mean, bn.running_var * ((rows - 1) / rows)


def assert_as_eager(c, what):
    rows = c.permute(0, 2, 3, 1).flatten(0, 2).double()
    exact = rows.mean(0), rows.var(0, correction=0)
    for name, *values in zip(
        ("mean", "var"), functions.backend()(BnStats(c)), eager_statistics(c), exact, strict=True
    ):
        assert_as_accurate_as_eager(*values, f"{name}, {what}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 5.0, 100.0])
def test_statistics_of_many_rows(mean, dtype):
    c = torch.randn(16, 64, 56, 56, generator=torch.Generator().manual_seed(0)) + mean
    assert_as_eager(c.to(DTYPES[dtype], memory_format=torch.channels_last), "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outlier", [1e5, 1e7, -1e7])
def test_statistics_with_one_value_far_from_all_others(outlier, dtype):
    """Also in the rows that are sampled for the shift, at multiples of the golden ratio."""
    c = torch.randn(4, 8, 64, 64, generator=torch.Generator().manual_seed(0)) + 5
    c = c.to(DTYPES[dtype], memory_format=torch.channels_last)
    rows = c.permute(0, 2, 3, 1).flatten(0, 2)
    for place in range(1, 17):
        row = int(place * 0.6180339887498949 % 1 * len(rows))
        kept, rows[row] = rows[row].clone(), outlier
        assert c[row // 4096, 0].flatten()[row % 4096] == rows[row, 0], "rows are a view of c"
        assert_as_eager(c, f"{outlier} in row {row}")
        rows[row] = kept
