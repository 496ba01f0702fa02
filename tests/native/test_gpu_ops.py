"""Every raw op of the compiled backends on a GPU, by the checks that every backend has to pass.

Without one the same kernels run in a host build (`test_cuda_host.py`) and interpreted (`test_triton_interpreter.py`).
"""

from dataclasses import replace

import every_raw_op
import pytest
import torch
from conv1x1_cases import ConvCase
from cuda_host_cases import PRODUCTS, dtypes_of
from raw_op_cases import cases_of
from raw_op_checks import CHECKS
from test_native_ops import Recorder, expected_backend
from triton_interpreted_ops import check, selected

from fusedres.ops import triton_reasons
from fusedres.ops.contract import RAW_OPS
from fusedres.ops.dispatch import LOADERS

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

DEVICE = "cuda"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# convolutions are the library's own on a GPU
NATIVE = [(op, case) for op in CHECKS if not op.startswith("conv") for case in cases_of(op)]


def left_to_the_reference(op, case):
    return RAW_OPS.get(op) in triton_reasons.PRODUCTS and case.dtype == torch.float32


@pytest.mark.skipif("native" not in LOADERS, reason="no compiled library in this installation")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), NATIVE, ids=[f"{op}-{case}" for op, case in NATIVE])
def test_native(op, case, dtype):
    ops, case = Recorder(), replace(case, dtype=DTYPES[dtype], device=DEVICE)
    CHECKS[op](ops, case)
    if op != "bn_layer":
        assert {name for called, name in ops.served if called == op} == {expected_backend(op, case)}


CONVOLUTIONS = [(op, case) for op in PRODUCTS for case in every_raw_op.cases_of(op)]


@pytest.mark.skipif("native" not in LOADERS, reason="no compiled library in this installation")
@pytest.mark.parametrize(("op", "case"), CONVOLUTIONS, ids=[f"{op}-{case}" for op, case in CONVOLUTIONS])
def test_native_products(op, case):
    """In both dtypes of tensor cores."""
    for dtype in dtypes_of(op, case):
        ops = Recorder()
        every_raw_op.CHECKS[op](ops, replace(case, dtype=dtype, device=DEVICE))
        if case.layout in ("channels_last", "offset"):
            assert {name for called, name in ops.served if called == op} <= {"native"}


MANY_ROWS = ConvCase("P200704", (64, 64, 56, 56), form="mask_center", cout=64, dy_mean=1.0)


@pytest.mark.parametrize("bias", [3.0, 30.0])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_triton_weight_gradient_of_many_rows(bias, dtype):
    """Tensor cores truncate as they add: in long sums of large means that is an error of its own, on GPUs alone."""
    case = replace(MANY_ROWS, bias_before=bias, dtype=DTYPES[dtype], device=DEVICE)
    check("conv1x1_backward_weight", case)


@pytest.mark.parametrize(
    ("op", "case"), [p for p in selected(DTYPES) if not left_to_the_reference(*p.values)]
)
def test_triton(op, case):
    check(op, replace(case, device=DEVICE))
