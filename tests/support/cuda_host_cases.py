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
# several steps for each tap, and several tiles, which end within images and lines
MANY_TILES = ConvCase("P338", (2, 40, 13, 13), cout=24)
TILED_FORMS = ("prologue_identity_mask", "prologue_stats")
# under ThreadSanitizer: several blocks to merge, both ways to load, ragged ends, an unaligned start, hardly anything
# and nothing at all
RACES = ("groups", "groups_C129", "offset_C24", "C1", "C3", "C8", "nan_inf", "P1", "N0")
# every kernel, with several steps, blocks and tiles of a block
PRODUCT_RACES = {
    "conv1x1_forward": (
        "C130to33-prologue_projection_mask",
        "C40to136-prologue_stats",
        "C40to136-raw",
        "P1100-bias_stats",
        "N0-prologue_projection_mask",
    ),
    "conv3x3_forward": (
        "C24to8-prologue_identity_mask",
        "C3to17-prologue_stats",
        "even-stride2_stats",
        "even-raw",
        "C3to17-prologue_identity_mask",
        "N0-prologue_identity_mask",
    ),
    "conv1x1_backward_input": ("C130to33-identity_mask", "P1100-frozen_identity_mask", "N0-identity_mask"),
    "conv1x1_backward_weight": ("C130to33-mask_center", "P1100-mask", "N0-mask_center"),
    "gram": ("C130to33", "P1100", "N0"),
    "conv1x1_gram_backward_input": ("C130to33-training_mask", "P1100-frozen_mask", "N0-training_mask"),
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


def product_cases(op: str) -> list[Case]:
    """Every form on some shapes, and the first form on every shape and value."""
    if op == "conv3x3_forward":  # whose own cases are small
        return [replace(MANY_TILES, form=form) for form in TILED_FORMS] + list(cases_of(op))
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
