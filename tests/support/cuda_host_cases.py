"""What the host build of the CUDA kernels is checked on: ops, cases, dtypes, and orders of threads and blocks."""

from __future__ import annotations

from dataclasses import replace

import torch
from raw_op_cases import Case, cases_of
from raw_op_checks import CHECKS

LIBRARY = ("conv_backward_input", "conv_backward_weight")
OPS = [op for op in CHECKS if op not in LIBRARY]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEEDS = (1, 2, 3)
# several blocks for the last one to merge, with packets and with single channels
GROUPS = (Case("groups", (2, 256, 5, 9)), Case("groups_C129", (2, 129, 5, 9)), Case("rows", (3, 8, 20, 30)))


# channels for packets where no packet may be loaded at once
UNALIGNED = Case("offset_C24", (1, 24, 3, 5), "offset")


def host_cases(op: str) -> list[Case]:
    """Every form of the op, on every shape and value that the front hands on as it is; the widest come first."""
    cases = list(cases_of(op))
    forms = dict.fromkeys(case.form for case in cases)
    more = [replace(case, form=form) for case in (*GROUPS, UNALIGNED) for form in forms]
    return [
        case for case in more + cases if case.layout in ("channels_last", "offset")
    ]  # it makes others dense
