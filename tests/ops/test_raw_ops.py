"""The reference backend against float64 and eager PyTorch, by the checks that every backend has to pass."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from every_raw_op import CHECKS, FORMS, cases_of

from fusedres.ops.contract import BnStats, Conv3x3Forward, ConvOutput
from fusedres.ops.reference import REFERENCE
from fusedres.ops.reference.values import activation

pytestmark = pytest.mark.no_cover  # it would take half as long again, and others call the same lines
DTYPES = (torch.float32, torch.bfloat16), (torch.float64, torch.float16)


def every_case():
    """Each in two of the dtypes: each form of an op is in all of them over its shapes, each shape over its forms."""
    for op in CHECKS:
        seen = Counter()  # cases of each form
        for case in cases_of(op):
            place = list(FORMS[op]).index(case.form) + seen[case.form]
            seen[case.form] += 1
            yield pytest.param(op, case, DTYPES[place % 2], id=f"{op}-{case}")


@pytest.mark.parametrize(("op", "case", "dtypes"), every_case())
def test_reference(op, case, dtypes):
    for dtype in dtypes:
        CHECKS[op](REFERENCE, replace(case, dtype=dtype))


def test_padding_that_is_not_zero_is_seen():
    """A prologue that reaches the padding makes relu(shift) of it."""

    def padded_first(op):
        if type(op) is not Conv3x3Forward:
            return REFERENCE(op)
        a = activation(F.pad(op.x, (1, 1, 1, 1)), op.in_scale, op.in_shift)
        y = F.conv2d(a, op.weight, None, op.stride)
        return ConvOutput(y, None, *REFERENCE(BnStats(y)))

    case = next(c for c in cases_of("conv3x3_forward") if str(c) == "C24to8-prologue_stats")
    with pytest.raises(AssertionError, match="y: error"):
        CHECKS["conv3x3_forward"](padded_first, replace(case, dtype=torch.float32))
