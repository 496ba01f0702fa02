"""Every raw op of the Triton backend under Triton's interpreter, in fp16 and fp32.

Run by `test_triton_interpreter.py` with TRITON_INTERPRET=1, or by hand:
    TRITON_INTERPRET=1 pytest tests/support/triton_interpreted_ops.py
The interpreter is slow, so each op runs on the forms and values where kernels go wrong, not on their product.
"""

import importlib
from dataclasses import replace

import pytest
import torch
from every_raw_op import CHECKS, cases_of
from triton_harness import checked_margins, served_by_triton

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
CASES = {
    "bn_stats": ("C3", "C130", "P1", "rows8000", "offset", "mean_over_std1000", "nan_inf"),
    "bn_scale_shift": ("C17-affine", "C130-half_weight", "C24-weight_only", "C3-bias_only", "C1-plain"),
    "bn_add_relu_forward": (
        "C17-projection_mask",
        "C130-identity_mask",
        "mixed-identity_mask",
        "expanded-projection_mask",
        "P1-mask",
        "nan_inf_C17-projection_mask",
        "C24-activation",
        "C3-identity_no_relu",
    ),
    "bn_add_relu_backward_reduce": (
        "C17-projection_mask",
        "C130-mask",
        "offset-relu",
        "rows8000-mask",
        "nan_inf-relu",
        "C3-no_relu",
        "expanded-mask",
        "mean_over_std1000-projection_no_relu",
    ),
    "bn_backward_coefficients": ("C17-training", "C130-frozen", "dy_mean1-training"),
    "bn_add_relu_backward_input": (
        "C17-projection_mask",
        "C130-projection_frozen_mask",
        "offset-identity_mask",
        "C3-identity_no_relu",
        "nan_inf_C17-relu",
        "mixed-relu_frozen",
    ),
    "relu_backward": ("C17", "C130", "offset", "nan_inf"),
    "bn_layer": ("C24-identity", "mean_over_std30-plain", "P4-identity"),
    "bn_relu_maxpool_forward": ("C17-3x3s2p1", "nan_inf-3x3s2p1", "C64-2x2s2p0", "C3-5x5s3p2"),
    "bn_relu_maxpool_backward_reduce": ("C17-3x3s2p1", "offset-5x5s3p2"),
    "bn_relu_maxpool_backward_input": ("C17-3x3s2p1", "nan_inf-3x3s1p1", "C64-3x3s2p1_frozen"),
    "conv1x1_forward": (
        "C17to24-prologue_projection_mask",
        "C3to17-prologue_mask",
        "C40to136-prologue_identity_mask",
        "C130to33-bias_stats",
        "P129-prologue_stats",
        "C17to24-stride2_stats",
        "nan_inf_C17-prologue_projection_mask",
        "mixed-stride2_prologue_bias_identity",
        "bias1000-prologue_stats",
        "offset-raw",
    ),
    "gram": ("C3to17", "C130to33", "P1", "P129", "P1100", "bias5", "bias30", "nan_inf", "bias1000"),
    "gram_output_stats": (
        "C3to17-bias",
        "C40to136-plain",
        "C130to33-bias",
        "P1100-plain",
        "bias30-bias",
        "bias1000-plain",
        "nan_inf_C17-bias",
    ),
    "gram_backward_coefficients": (
        "C3to17-training",
        "C130to33-training",
        "C40to136-training",
        "C130to33-frozen_bias",
        "C17to24-frozen",
        "P1100-training",
        "bias30-training",
        "bias1000-training",
        "bias1000-frozen_bias",
        "dy_mean1-training",
        "dy_mean1_bias30-training",
        "dy_mean1_bias1000-training",
        "zero_gamma-training",
        "nan_inf-training",
        "nan_inf_C17-frozen_bias",
    ),
    "conv1x1_backward_weight": (
        "C3to17-mask_center",
        "C40to136-mask_center",
        "P1100-mask",
        "mixed-center",
        "expanded-center",
        "dy_mean1-center",
        "dy_mean1-mask_center",
        "dy_mean1_P1100-mask_center",
        "dy_mean1_P1100-center",
        "dy_mean1_bias30-mask_center",
        "dy_mean1_bias1000-mask_center",
        "nan_inf_C17-mask",
    ),
    "conv1x1_gram_backward_input": (
        "C17to24-training_mask",
        "C130to33-training_mask",
        "C136to40-training_mask",
        "P129-frozen_mask",
        "bias30-training_mask",
        "expanded-training_mask",
        "dy_mean1_P1100-training_mask",
        "dy_mean1_bias1000-training_mask",
        "zero_gamma-training_mask",
        "nan_inf_C17-frozen",
        "nan_inf-training_mask",
        "nan_inf_C17-training_mask",
        "nan_inf-frozen_mask",
    ),
    "conv1x1_backward_input": (
        "C17to24-identity_mask",
        "C130to33-identity_mask",
        "C136to40-identity_mask",
        "P129-relu",
        "mixed-frozen_identity_mask",
        "nan_inf-no_relu",
    ),
}


def selected(dtypes, in_turn=False):
    """(op, case) of every name in CASES, in each of the dtypes by their names.

    Args:
        in_turn: that only of each op's first case, and each of the others in one of the dtypes.
    """
    for op, names in CASES.items():
        every = {str(case): case for case in cases_of(op)}
        for place, name in enumerate(names):
            for dtype in [list(dtypes)[place % len(dtypes)]] if in_turn and place > 0 else dtypes:
                yield pytest.param(op, replace(every[name], dtype=dtypes[dtype]), id=f"{op}-{name}-{dtype}")


def check(op, case):
    with checked_margins(), served_by_triton(case) as ops:
        CHECKS[op](ops, case)


MERGING = (
    "gram",
    "conv1x1_backward_weight",
    "conv1x1_gram_backward_input",
    "bn_relu_maxpool",
    "bn_add_relu_backward_reduce",
)
SUMS_MERGED = {
    "gram",
    "conv1x1_backward_weight",
    "conv1x1_gram_backward_input",
    "bn_relu_maxpool_backward_reduce",
    "bn_add_relu_backward_reduce",
    "bn_layer",
}


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


@pytest.mark.parametrize(("op", "case"), selected(DTYPES, in_turn=True))
def test_op(op, case, merged):
    """Sums are of what kernels wrote, as compute-sanitizer's initcheck holds them to on a GPU: memory that launchers
    make begins as NaN here, and so would every sum over partial results that takes in what was never written."""
    check(op, case)
    assert bool(merged) == (op in SUMS_MERGED)
    assert case.special or all(t.isfinite().all() for t in merged)


@pytest.mark.parametrize("op", ["bn_stats", "bn_add_relu_forward", "gram", "conv1x1_forward"])
def test_empty_batch_goes_to_the_next_backend(op):
    case = next(case for case in cases_of(op) if case.id == "N0")
    with served_by_triton(case) as ops:
        CHECKS[op](ops, case)


@pytest.mark.parametrize("rows", [16, 4])
def test_moments_of_many_groups(rows, monkeypatch):
    """32 tiles in two groups, and in eight, which are merged once more first: sizes that take 65,536 rows otherwise."""
    from fusedres.triton_kernels import merge

    monkeypatch.setattr(merge, "MERGE_ROWS", rows)
    monkeypatch.setattr(merge, "BLOCK_ROWS", rows)  # a group is whole blocks
    every = {str(case): case for case in cases_of("bn_stats")}
    for case in (every["rows8000"], every["mean0"]):
        check("bn_stats", replace(case, dtype=torch.float32))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("nan_inf-center", "fp16"), ("nan_inf_C17-mask_center", "fp32"), ("nan_inf_C17-center", "fp16")],
)
def test_infinities_of_centred_activations(name, dtype):
    """Not in bfloat16, where center*dbias is subtracted from infinities of another sign."""
    every = {str(case): case for case in cases_of("conv1x1_backward_weight")}
    check("conv1x1_backward_weight", replace(every[name], dtype=DTYPES[dtype]))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("dy_mean1-mask_center", "fp16"),
        ("dy_mean1-mask_center", "fp32"),
        ("dy_mean1_P1100-mask_center", "fp16"),
        ("dy_mean1_bias30-mask_center", "fp32"),
        ("dy_mean1_bias1000-mask_center", "fp16"),
        ("C40to136-center", "fp32"),
        ("P1100-mask", "fp16"),
        ("nan_inf_C17-mask", "fp32"),
    ],
)
def test_the_pivot_of_bfloat16(name, dtype, monkeypatch):
    """It subtracts before the product only where the mean is far from 0; interpreted, other dtypes do as it does."""
    from fusedres.triton_kernels import conv1x1_backward_weight as module

    monkeypatch.setattr(module, "ROUNDS_COARSELY", tuple(DTYPES.values()))
    every = {str(case): case for case in cases_of("conv1x1_backward_weight")}
    check("conv1x1_backward_weight", replace(every[name], dtype=DTYPES[dtype]))


@pytest.mark.parametrize("finite_left", [True, False])
def test_infinities_of_what_is_subtracted_from_sums(finite_left):
    """In bfloat16 what is not finite in the left factor is subtracted as it is, in other dtypes it is left out."""
    from fusedres.triton_kernels.merge import merge_sums

    generator = torch.Generator().manual_seed(0)
    partials, right = (torch.randn(shape, generator=generator) for shape in ((5, 4, 3), (3,)))
    left = torch.tensor([1.5, float("inf"), float("-inf"), float("nan")])
    kept = torch.where(left.isfinite(), left, 0) if finite_left else left
    expected = (partials.double().sum(0) - torch.outer(kept, right).double()).float()
    found = merge_sums(partials, (left, right), finite_left=finite_left)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)  # in float64, rounded once


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("C136to40-identity_mask", "fp16"),
        ("C136to40-identity_mask", "fp32"),
        ("C17to24-identity_mask", "fp16"),
        ("P129-relu", "fp32"),
        ("mixed-frozen_identity_mask", "fp16"),
        ("nan_inf-identity", "fp32"),
        ("nan_inf_C17-no_relu", "fp16"),
    ],
)
def test_dc_made_by_a_pass_of_its_own(name, dtype, monkeypatch):
    """As for 1024 channels and more; few take less time."""
    from fusedres.triton_kernels import tiles

    monkeypatch.setattr(tiles, "dc_comes_first", lambda cin, cout: True)
    every = {str(case): case for case in cases_of("conv1x1_backward_input")}
    check("conv1x1_backward_input", replace(every[name], dtype=DTYPES[dtype]))
