"""Memory that no kernel wrote is read by none: what compute-sanitizer's initcheck holds them to on a GPU.

Run like `triton_interpreted_ops.py`. The memory that launchers make begins as NaN here, and so would every sum over
partial results that takes in what was never written.
"""

import importlib
from dataclasses import replace

import pytest
import torch
from every_raw_op import CHECKS, cases_of
from triton_harness import checked_margins, served_by_triton

MERGING = (
    "gram",
    "conv1x1_backward_weight",
    "conv1x1_gram_backward_input",
    "bn_relu_maxpool",
    "bn_add_relu_backward_reduce",
)
# of one tile and of several, the last of them in part
CASES = [
    *(("gram", case) for case in ("C3to17", "C40to136", "C130to33", "P1100")),
    ("conv1x1_backward_weight", "C130to33-mask_center"),
    ("conv1x1_gram_backward_input", "C130to33-training_mask"),
    ("bn_add_relu_backward_reduce", "C130-mask"),
    ("bn_relu_maxpool_backward_reduce", "C17-3x3s2p1"),
]


@pytest.fixture
def merged(monkeypatch):
    """The results of every merge of partial sums."""
    found = []

    def noted(merge):
        def run(*args, **kwargs):
            found.append(merge(*args, **kwargs))
            return found[-1]

        return run

    for name in MERGING:
        module = importlib.import_module(f"fusedres.triton_kernels.{name}")
        monkeypatch.setattr(module, "merge_sums", noted(module.merge_sums))
    return found


@pytest.mark.parametrize(("op", "case"), CASES)
def test_sums_are_of_what_was_written(op, case, merged):
    chosen = replace(next(c for c in cases_of(op) if str(c) == case), dtype=torch.float16)
    with checked_margins(), served_by_triton(chosen) as ops:
        CHECKS[op](ops, chosen)
    assert merged and all(t.isfinite().all() for t in merged)
