"""The native backend on the CPU, by the checks that every backend has to pass."""

from dataclasses import replace

import pytest
import torch
from raw_op_cases import cases_of
from raw_op_checks import CHECKS

from fusedres.backends import native
from fusedres.backends.reference import ReferenceOps

pytestmark = pytest.mark.skipif(not native.is_built(), reason="no compiled library in this installation")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [pytest.param(op, case, id=f"{op}-{case}") for op in CHECKS for case in cases_of(op)]


class Recorder:
    """The native ops, then the reference; remembers which of them served each call."""

    def __init__(self):
        self.backends = native.NativeOps(), ReferenceOps()
        self.served = []

    def __getattr__(self, op):
        def call(*args):
            backend = next(b for b in self.backends if b.supports(op, *args) is None)
            self.served.append((op, backend.name))
            return getattr(backend, op)(*args)

        return call


def expected_backend(op, case):
    """Native wherever every activation that the op gets is dense channels_last."""
    if op in ("bn_backward_coefficients", "bn_scale_shift"):
        return "reference" if case.form == "half_weight" else "native"
    if op == "conv_bias_add_relu_forward" and (
        case.id == "N0" or case.dtype not in native.fused_convolution_dtypes()
    ):
        return "reference"
    kernel3 = case.form in ("3x3s2", "groups", "dilation")  # these have a residual too
    several = kernel3 or "backward_" in op or "identity" in case.form or "projection" in case.form
    dense = ("channels_last", "offset") if several else ("channels_last", "offset", "expanded", "mixed")
    return "native" if case.layout in dense else "reference"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_native(op, case, dtype):
    ops, case = Recorder(), replace(case, dtype=DTYPES[dtype])
    CHECKS[op](ops, case)
    if op != "bn_layer":
        assert {name for called, name in ops.served if called == op} == {expected_backend(op, case)}
