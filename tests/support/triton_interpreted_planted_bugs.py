"""Bugs planted in the kernels' sources; a check has to catch each. Run like `triton_interpreted_ops.py`."""

import sys
from dataclasses import replace

import pytest
import torch
from every_raw_op import CHECKS, cases_of
from planted_source import with_replacements
from triton_harness import checked_margins, served_by_triton
from triton_interpreted_ops import DTYPES, selected

from fusedres.triton_kernels import launchers

# id: (op, case, dtype, replacements in the op's source)
BUGS = {
    "dropped_mask_in_weight_gradient": (
        "conv1x1_backward_weight",
        "C3to17-mask_center",
        "float16",
        (("if mask is not None:", "if False:"),),
    ),
    "dropped_mask_in_input_gradient": (
        "conv1x1_gram_backward_input",
        "C17to24-training_mask",
        "float16",
        (("dz = select_in_tile", "_ = select_in_tile"),),
    ),
    "infinities_in_the_second_term_of_a_weight": (
        "conv1x1_gram_backward_input",
        "nan_inf-training_mask",
        "float16",
        (("tl.dot(rest, w, acc", "tl.dot(x, w, acc"),),
    ),
    "dropped_mask_of_the_shortcut": (
        "conv1x1_backward_input",
        "C17to24-identity_mask",
        "float32",
        (("side = select_in_tile", "_ = select_in_tile"),),
    ),
    "wrong_column_tile_offset": (
        "conv1x1_forward",
        "C40to136-prologue_identity_mask",
        "float16",
        (("column_tiles) * BN + tl.arange(0, BN)", "column_tiles) * (BN - 1) + tl.arange(0, BN)"),),
    ),
    "statistics_over_padded_rows": (
        "conv1x1_forward",
        "P129-prologue_stats",
        "float16",
        (("tile_moments(stored, valid,", "tile_moments(stored, rows >= 0,"),),
    ),
    "rounded_raw_weight_gradient": (
        "conv1x1_backward_weight",
        "P1100-mask",
        "float16",
        (
            (
                "tl.store(partial_r + place, r,",
                "tl.store(partial_r + place, r.to(c.dtype.element_ty).to(tl.float32),",
            ),
        ),
    ),
    "pivot_of_all_bits": (
        "conv1x1_backward_weight",
        "dy_mean1_P1100-center",
        "float16",
        (("exact.to(tl.bfloat16).to(tl.float32)", "exact.to(tl.float16).to(tl.float32)"),),
    ),
    "rest_of_the_center_left_out": (
        "conv1x1_backward_weight",
        "dy_mean1-mask_center",
        "float16",
        (("tl.store(rest + i, exact - value,", "tl.store(rest + i, 0.0 * value,"),),
    ),
    "relu_that_drops_nan": (
        "conv1x1_forward",
        "nan_inf_C17-prologue_projection_mask",
        "float16",
        (("acc = relu(acc)", "acc = tl.where(acc > 0, acc, 0.0)"),),
    ),
    "store_past_the_last_element": (
        "bn_add_relu_forward",
        "C17-projection_mask",
        "float16",
        (
            (
                "tl.store(y + base + place, out, mask=valid)",
                "tl.store(y + base + place, out, mask=place <= N - base)",
            ),
        ),
    ),
    "uncentred_gram": (
        "gram",
        "bias1000",
        "float16",
        (("return mean * mean * count > 16.0 * m2", "return mean != mean"),),
    ),
    "bias_left_out_of_the_mean": (
        "gram_output_stats",
        "C3to17-bias",
        "float16",
        (("if bias is not None:", "if False:"),),
    ),
    "negative_variance_and_nan_to_zero": (
        "gram_output_stats",
        "nan_inf_C17-bias",
        "float16",
        (
            (
                "tl.maximum(second, 0.0, propagate_nan=tl.PropagateNan.ALL)",
                "tl.where(second > 0, second, 0.0)",
            ),
        ),
    ),
    "rest_of_the_mean_left_out": (
        "gram_backward_coefficients",
        "dy_mean1_bias30-training",
        "float16",
        (("sum_dz[:, None] * load_rest(m, center, k, size)[None, :]", "0.0 * sum_dz[:, None]"),),
    ),
    "offset_of_the_first_rows_only": (
        "gram_backward_coefficients",
        "C40to136-training",
        "float16",
        (("for o0 in range(0, COUT, BM):", "for o0 in range(0, BM, BM):"),),
    ),
    "second_term_of_a_weight_left_out": (
        "conv1x1_gram_backward_input",
        "bias30-training_mask",
        "float16",
        (
            (
                "tl.store(terms + ROWS * CIN + place, low, mask=keep)",
                "tl.store(terms + ROWS * CIN + place, 0.0 * low, mask=keep)",
            ),
        ),
    ),
    "offset_moved_the_other_way": (
        "conv1x1_gram_backward_input",
        "bias30-training_mask",
        "float16",
        (("to(tl.float64) - added", "to(tl.float64) + added"),),
    ),
    "last_maximum_instead_of_first": (
        "bn_relu_maxpool_forward",
        "C64-2x2s2p0",
        "float16",
        (("(a > best)", "(a >= best)"),),
    ),
}


def test_every_run_has_their_cases():
    every = {(op, str(case), case.dtype) for op, case in (p.values for p in selected(DTYPES, in_turn=True))}
    missing = [
        bug for bug, (op, name, dtype, _) in BUGS.items() if (op, name, getattr(torch, dtype)) not in every
    ]
    assert not missing


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, tmp_path, monkeypatch):
    op, name, dtype, replacements = BUGS[bug]
    module = sys.modules[getattr(launchers, op).__module__]
    planted = with_replacements(module, replacements, tmp_path)
    case = next(case for case in cases_of(op) if str(case) == name)
    case = replace(case, dtype=getattr(torch, dtype))
    with served_by_triton(case) as ops, checked_margins():
        CHECKS[op](ops, case)  # sound as it stands
    monkeypatch.setattr(launchers, op, getattr(planted, op))
    with pytest.raises(AssertionError), served_by_triton(case) as ops, checked_margins():
        CHECKS[op](ops, case)
