"""Every raw op of the compiled backends on a GPU, by the checks that every backend has to pass.

Without one the same kernels run in a host build (`test_cuda_host.py`) and interpreted (`test_triton_interpreter.py`).
"""

from dataclasses import replace

import conv1x1_cases
import conv1x1_checks
import pytest
import raw_op_cases
import raw_op_checks
import torch
from test_native_ops import Recorder, expected_backend
from triton_harness import checked_margins, served_by_triton
from triton_interpreted_ops import CASES

from fusedres.backends.triton import PRODUCTS
from fusedres.dispatch import LOADERS

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

DEVICE = "cuda"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def native_cases():
    for op in raw_op_checks.CHECKS:
        if not op.startswith("conv"):  # the library's own on a GPU
            for case in raw_op_cases.cases_of(op):
                yield pytest.param(op, case, id=f"{op}-{case}")


def triton_cases():
    for op, names in CASES.items():
        source = conv1x1_cases if op in conv1x1_checks.CHECKS else raw_op_cases
        every = {str(case): case for case in source.cases_of(op)}
        for name in names:
            for dtype in DTYPES:
                if op not in PRODUCTS or dtype != "fp32":  # those products are left to the reference
                    yield pytest.param(op, every[name], dtype, id=f"{op}-{name}-{dtype}")


@pytest.mark.skipif("native" not in LOADERS, reason="no compiled library in this installation")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), native_cases())
def test_native(op, case, dtype):
    ops, case = Recorder(), replace(case, dtype=DTYPES[dtype], device=DEVICE)
    raw_op_checks.CHECKS[op](ops, case)
    if op != "bn_layer":
        assert {name for called, name in ops.served if called == op} == {expected_backend(op, case)}


@pytest.mark.parametrize(("op", "case", "dtype"), triton_cases())
def test_triton(op, case, dtype):
    case = replace(case, dtype=DTYPES[dtype], device=DEVICE)
    checks = {**raw_op_checks.CHECKS, **conv1x1_checks.CHECKS}
    with checked_margins(), served_by_triton(case) as ops:
        checks[op](ops, case)
