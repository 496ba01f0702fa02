"""Runs the raw-op checks on the vector kernels of the native library, in a process of its own.

python native_kernels_run.py CAPABILITY    exit 0, or the first failure; CAPABILITY is what must be in use
"""

import sys
from dataclasses import replace

import conv1x1_cases
import conv1x1_checks
import torch
from raw_op_cases import FORMS, Case, cases_of
from raw_op_checks import CHECKS

from fusedres.blocks import choice
from fusedres.ops.backend import Backend
from fusedres.ops.native import functions, library

# every remainder of a vector of 16, an unaligned start, NaN and Inf, sums over several threads, nothing at all
CASES = ("C3", "C17", "C24", "offset", "nan_inf_C17", "rows8000", "N0")
PRODUCTS = ("C3to17", "C17to24", "C40to136", "C130to33", "P1100", "nan_inf_C17")
SCALAR = ("bn_scale_shift", "bn_backward_coefficients")


def main(capability: str) -> None:
    ops = functions.backend()
    assert library.instruction_set() == capability
    assert choice.table_of(capability, library.multiplies_bfloat16()) == choice.TABLE
    checked = 0
    for op in (op for op in CHECKS if op not in SCALAR):
        for case in cases_of(op):
            if case.id not in CASES or (case.id == "rows8000" and case.form != FORMS[op][0]):
                continue
            if not has_kernel(op, case):
                continue
            for dtype in (torch.float32,) if "conv" in op else (torch.float32, torch.bfloat16):
                check(ops, op, replace(case, dtype=dtype))
                checked += 1
    for case in conv1x1_cases.cases_of("conv1x1_forward"):
        if case.id in PRODUCTS and case.form in ("projection", "affine"):
            conv1x1_checks.CHECKS["conv1x1_forward"](ops, case)
            checked += 1
    print(f"{checked} passed, 0 failed")


def has_kernel(op: str, case: Case) -> bool:
    if op == "conv_backward_weight":
        return case.form != "groups"
    if op == "conv_backward_input":
        return case.form.startswith("1x1") and (case.form != "1x1_mask" or case.shape[1] % 8 == 0)
    return True


def check(ops: Backend, op: str, case: Case) -> None:
    try:
        CHECKS[op](ops, case)
    except AssertionError as error:
        raise AssertionError(f"{op} {case} {case.dtype}: {error}") from error


if __name__ == "__main__":
    main(*sys.argv[1:])
