"""The reference backend against float64 and eager PyTorch, by the checks that every backend has to pass."""

from dataclasses import replace

import pytest
import torch
from raw_op_cases import cases_of
from raw_op_checks import CHECKS

from fusedres.backends.reference import REFERENCE

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [pytest.param(op, case, id=f"{op}-{case}") for op in CHECKS for case in cases_of(op)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_reference(op, case, dtype):
    CHECKS[op](REFERENCE, replace(case, dtype=DTYPES[dtype]))
