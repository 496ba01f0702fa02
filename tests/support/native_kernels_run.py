"""Runs the raw-op checks on the vector kernels of the native library, in a process of its own.

python native_kernels_run.py CAPABILITY    exit 0, or the first failure; CAPABILITY is what must be in use
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import conv1x1_cases
import conv1x1_checks
import conv3x3_checks
import grouped_checks
import torch
from raw_op_cases import FORMS, Case, cases_of
from raw_op_checks import CHECKS
from winograd_backends import with_tiles

from fusedres.blocks import choice
from fusedres.ops.backend import Backend
from fusedres.ops.native import functions, grouped, library, winograd

# every remainder of a vector of 16, an unaligned start, NaN and Inf, sums over several threads, nothing at all
CASES = ("C3", "C17", "C24", "offset", "nan_inf_C17", "rows8000", "N0")
PRODUCTS = ("C3to17", "C17to24", "C40to136", "C130to33", "P1100", "nan_inf_C17")
FUSED = ("prologue_stats", "prologue_projection", "identity_no_relu", "raw")
GRADIENTS = {"conv_backward_weight": ("3x3",), "conv_backward_input": ("3x3_mask",)}
SIDES_WITH_GROUPS = ((1, 9), (15, 11))
SCALAR = ("bn_scale_shift", "bn_backward_coefficients")


def main(capability: str) -> None:
    ops = functions.backend()
    assert library.instruction_set() == capability
    assert choice.table_of(capability, library.multiplies_bfloat16()) == choice.TABLE
    checked = 0
    os.environ[winograd.ENVIRONMENT_VARIABLE] = "0"  # the direct kernels first
    for op in (op for op in CHECKS if op not in SCALAR):
        for case in cases_of(op):
            if case.id not in CASES or (case.id == "rows8000" and case.form != FORMS[op][0]):
                continue
            if not has_kernel(op, case) or case.form == "3x3_mask":
                continue
            for dtype in (torch.float32,) if "conv" in op else (torch.float32, torch.bfloat16):
                check(ops, op, replace(case, dtype=dtype))
                checked += 1
    for case in conv1x1_cases.cases_of("conv1x1_forward"):
        if case.id in PRODUCTS and case.form in ("projection", "affine"):
            for form in (case.form, f"stride2_{case.form}"):
                conv1x1_checks.CHECKS["conv1x1_forward"](ops, replace(case, form=form))
                checked += 1
    grouped.MOST_IN_GROUP = grouped.MOST_IN_GROUP_WITH_BN = 64  # those too that the library is as fast with
    for case in product(SIDES_WITH_GROUPS, grouped_checks.GROUPS, grouped_checks.STRIDES):
        (height, width), (channels, in_group), stride = case
        grouped_checks.check_forward(height, width, channels, in_group, stride)
        grouped_checks.check_gradients(height, width, channels, in_group, stride)
        checked += 2
    del os.environ[winograd.ENVIRONMENT_VARIABLE]
    for tile in (winograd.LARGE, winograd.SMALL):
        for op, case in conv3x3_cases():
            check(with_tiles(tile), op, case)
            checked += 1
    print(f"{checked} passed, 0 failed")


def conv3x3_cases() -> Iterator[tuple[str, Case]]:
    """What runs by Winograd's algorithm, of any size."""
    for case in conv3x3_checks.cases_of("conv3x3_forward"):
        if case.form in FUSED and case.id not in ("N0", "P1") and case.layout in ("channels_last", "offset"):
            yield "conv3x3_forward", case
    for op, forms in GRADIENTS.items():
        for case in cases_of(op):
            if case.id in CASES and case.form in forms and has_kernel(op, case):
                yield op, case


def has_kernel(op: str, case: Case) -> bool:
    if op == "conv_backward_weight":
        return case.form != "groups"
    if op == "conv_backward_input":
        plain = case.form.startswith("1x1") or case.form == "3x3_mask"
        return plain and ("mask" not in case.form or case.shape[1] % 8 == 0)
    return True


def check(ops: Backend, op: str, case: Case) -> None:
    try:
        {**CHECKS, **conv3x3_checks.CHECKS}[op](ops, case)
    except AssertionError as error:
        raise AssertionError(f"{op} {case} {case.dtype}: {error}") from error


if __name__ == "__main__":
    main(*sys.argv[1:])
