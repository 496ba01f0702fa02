"""What the host build of the CUDA kernels is checked on: ops, cases, dtypes, and orders of threads and blocks."""

from __future__ import annotations

from dataclasses import replace

import raw_op_checks
import torch
from conv1x1_cases import ConvCase
from every_raw_op import FORMS, cases_of
from raw_op_cases import Case

LIBRARY = ("conv_backward_input", "conv_backward_weight")
BN_OPS = [op for op in raw_op_checks.CHECKS if op not in LIBRARY]
PRODUCTS = [  # on tensor cores
    "conv1x1_forward",
    "conv3x3_forward",
    "conv3x3_backward_input",
    "conv1x1_backward_input",
    "conv1x1_backward_weight",
    "gram",
    "conv1x1_gram_backward_input",
    "gram_output_stats",
    "gram_backward_coefficients",
]
OPS = BN_OPS + PRODUCTS
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"fp32": torch.float32, **HALF_DTYPES}
SEEDS = (1, 2, 3)
# several blocks for the last one to merge, with packets and with single channels
GROUPS = (Case("groups", (2, 256, 5, 9)), Case("groups_C129", (2, 129, 5, 9)), Case("rows", (3, 8, 20, 30)))


# channels for packets where no packet may be loaded at once
UNALIGNED = Case("offset_C24", (1, 24, 3, 5), "offset")

# of a product: one block and one step; several steps and columns of tiles, with single channels and with packets;
# several tiles of rows for each of several blocks
EVERY_FORM = ("C17to24", "C130to33", "C40to136", "P1100")
# many rows, and a gradient with a mean: what every row has alike does not average out
EVERY_FORM_OF = {"conv1x1_gram_backward_input": ("dy_mean1_P1100",)}
# 512 rows a block, all products positive: what tensor cores cut off as they add would show
LONG_SUM = ConvCase("P4096", (1, 16, 64, 64), cout=8, dy_mean=3.0, bias_before=3.0, form="mask")
# Of 3x3 convolutions. Two halos side by side, several steps and several tiles, which end within images and lines; one
# halo at a time, whose last place a tap reads; lines too wide for a halo, and channels for two columns of tiles.
HALOS = (ConvCase("P338", (2, 40, 13, 13), cout=40), ConvCase("W40", (1, 72, 5, 40), cout=72))
WIDE = ConvCase("W127", (1, 16, 2, 127), cout=24)
COLUMNS = ConvCase("C8to136", (1, 8, 3, 5), cout=136)
CASES_3X3 = {
    "conv3x3_forward": [
        *(
            replace(case, form=form)
            for case in HALOS
            for form in ("prologue_identity_mask", "prologue_stats")
        ),
        *(replace(WIDE, form=form) for form in ("prologue_identity_mask", "prologue_stats", "raw")),
        replace(COLUMNS, form="stats"),
    ],
    "conv3x3_backward_input": [
        *(replace(case, form=form) for case in HALOS for form in ("bn_identity_mask", "identity")),
        replace(COLUMNS, form="bn_identity_mask"),
        replace(COLUMNS, shape=(1, 136, 3, 5), cout=8, form="bn_identity_mask"),
    ],
}
# under ThreadSanitizer: several blocks to merge, both ways to load, ragged ends, an unaligned start, hardly anything
# and nothing at all
RACES = ("groups", "groups_C129", "offset_C24", "C1", "C3", "C8", "nan_inf", "P1", "N0")
# every kernel, with several steps, blocks and tiles of a block
PRODUCT_RACES = {
    "conv1x1_forward": (
        "C130to33-prologue_projection_mask",
        "C40to136-prologue_projection_mask",
        "C40to136-prologue_stats",
        "C40to136-raw",
        "P1100-bias_stats",
        "N0-prologue_projection_mask",
    ),
    "conv3x3_forward": (
        "W40-prologue_identity_mask",
        "P338-prologue_stats",
        "C8to136-stats",
        "even-raw",
        "C3to17-prologue_identity_mask",
        "W127-prologue_identity_mask",
        "W127-prologue_stats",
        "W127-raw",
        "even-stride2_stats",
        "C3to17-stride2_stats",
        "N0-prologue_identity_mask",
    ),
    "conv3x3_backward_input": (
        "W40-bn_identity_mask",
        "P338-identity",
        "C3to17-bn_identity_mask",
        "N0-bn_identity_mask",
    ),
    "conv1x1_backward_input": (
        "C130to33-identity_mask",
        "C130to33-frozen_identity_mask",
        "C40to136-identity_mask",
        "C40to136-identity",
        "C40to136-no_relu",
        "P1100-frozen_identity_mask",
        "N0-identity_mask",
    ),
    "conv1x1_backward_weight": ("C130to33-mask_center", "P1100-mask", "N0-mask_center"),
    "gram": ("C130to33", "C136to40", "P1100", "N0"),
    "conv1x1_gram_backward_input": (
        "C130to33-training_mask",
        "C40to136-training_mask",
        "P1100-frozen_mask",
        "N0-training_mask",
    ),
    "gram_output_stats": ("C130to33-bias", "C40to136-plain"),
    "gram_backward_coefficients": ("C130to33-training", "C40to136-frozen_bias"),
}


def runs_under_thread_sanitizer(op: str, case: Case) -> bool:
    return str(case) in PRODUCT_RACES[op] if op in PRODUCTS else case.id in RACES


def dtypes_of(op: str, case: Case) -> list[torch.dtype]:
    if op not in PRODUCTS:
        return list(DTYPES.values())
    # where center*dbias is subtracted after the product, infinities of another sign meet
    subtracted_after = op == "conv1x1_backward_weight" and case.special and "center" in case.form
    return [torch.float16] if subtracted_after else list(HALF_DTYPES.values())


def takes(op: str, case: Case) -> bool:
    """Whether csrc/cuda has a kernel for it."""
    return op != "conv3x3_backward_input" or "stride2" not in case.form


def product_cases(op: str) -> list[Case]:
    """Every form on some shapes, and the first form on every shape and value."""
    if op in CASES_3X3:  # whose own cases are small
        return CASES_3X3[op] + [case for case in cases_of(op) if takes(op, case)]
    long = [LONG_SUM] if op == "conv1x1_backward_weight" else []
    every_form = EVERY_FORM + EVERY_FORM_OF.get(op, ())
    return long + [case for case in cases_of(op) if case.form == FORMS[op][0] or case.id in every_form]


def host_cases(op: str) -> list[Case]:
    """Every form of the op, on every shape and value that the front hands on as it is; the widest come first."""
    if op in PRODUCTS:
        cases = product_cases(op)
    else:
        cases = list(cases_of(op))
        forms = dict.fromkeys(case.form for case in cases)
        cases = [replace(case, form=form) for case in (*GROUPS, UNALIGNED) for form in forms] + cases
    return [case for case in cases if case.layout in ("channels_last", "offset")]  # it makes others dense
