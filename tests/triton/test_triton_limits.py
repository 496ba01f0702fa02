"""How many instructions the kernels of ResNet-50's third stage may take on sm_90, and that slower ones take more.

The figures are those of `triton_resources.json`. A loop's are of one warp and step, for each instruction of tensor
cores in it: a step that does half the work may take half.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

import triton
from planted_source import with_replacements
from triton_entries import entries
from triton_resources import compile_entry, read_table

from fusedres.triton_kernels import conv1x1_backward_weight, conv1x1_gram_backward_input

TABLE = read_table()
ENTRIES = {entry.id: entry for entry in entries()}
INPUT_GRADIENT = "conv1x1_gram_backward_input-training-128x128x32w8s3"
WEIGHT_GRADIENT = "conv1x1_backward_weight-mask_pivot-128x64x32w8s3"
STATISTICS = "conv1x1_forward-stats_stride1-128x128x64w8s3"
# of the first loop, for each product in it
STEP_LIMITS = {INPUT_GRADIENT: 240 / 4, WEIGHT_GRADIENT: 290 / 2}
# of the whole kernel, and the registers that let two programs share a multiprocessor: 65,536 / (2 * 256)
STATISTICS_LIMITS = {"instructions": 1400, "registers": 128}

MASK_OF_A_BYTE_AN_ELEMENT = ("load_vector, select_in_tile", "load_vector, select_by_mask")
# id: (entry, replacements in the source of its kernel)
SLOWER = {
    "mask_loaded_a_byte_an_element_in_input_gradient": (
        INPUT_GRADIENT,
        (
            MASK_OF_A_BYTE_AN_ELEMENT,
            (
                "select_in_tile(dz, mask + base // 8 * COUT, row, k0, valid, COUT, BM, BK)",
                "select_by_mask(dz, mask + base // 8 * COUT, dy_place, valid & (k0 + k < COUT)[None, :])",
            ),
        ),
    ),
    "second_term_loads_dz_again": (
        INPUT_GRADIENT,
        (
            (
                "    for k0 in range(0, COUT, BK):\n",
                "    for step in range(TERMS * ((COUT + BK - 1) // BK)):\n        k0 = step // TERMS * BK\n",
            ),
            (
                "multiply_terms(dz, weight_dz, k0 + k, n, acc, COUT, CIN, TERMS, PRECISION, WAIT)",
                "multiply_terms("
                "finite(dz), weight_dz + step % TERMS * COUT * CIN, k0 + k, n, acc, COUT, CIN, 1, PRECISION, WAIT)",
            ),
        ),
    ),
    "mask_loaded_a_byte_an_element_in_weight_gradient": (
        WEIGHT_GRADIENT,
        (
            MASK_OF_A_BYTE_AN_ELEMENT,
            (
                "select_in_tile(dz, mask + base // 8 * COUT, r0 + row, first, valid, COUT, BK, BM)",
                "select_by_mask(dz, mask + base // 8 * COUT, dy_place, valid & valid_o)",
            ),
        ),
    ),
    "sums_of_dz_over_threads_in_each_step": (
        WEIGHT_GRADIENT,
        (
            ("dz_sums = tl.zeros((BK, BM), tl.float32)", "dz_sums = tl.zeros((BM,), tl.float32)"),
            ("dz_sums += dz.to(tl.float32)", "dz_sums += tl.sum(dz.to(tl.float32), 0)"),
            ("dbias = tl.sum(dz_sums, 0)", "dbias = dz_sums"),
        ),
    ),
}
MODULES = {INPUT_GRADIENT: conv1x1_gram_backward_input, WEIGHT_GRADIENT: conv1x1_backward_weight}


def per_product(row):
    """Instructions of a step of the first loop for each product in it."""
    step, products = row["steps"][0]
    return step / products


@pytest.mark.parametrize("version", TABLE)
@pytest.mark.parametrize("entry_id", STEP_LIMITS)
def test_steps_are_short(entry_id, version):
    assert per_product(TABLE[version][f"{entry_id} sm_90"]) <= STEP_LIMITS[entry_id]


@pytest.mark.parametrize("version", TABLE)
@pytest.mark.parametrize("limit", STATISTICS_LIMITS)
def test_statistics_leave_room_for_a_second_program(limit, version):
    assert TABLE[version][f"{STATISTICS} sm_90"][limit] <= STATISTICS_LIMITS[limit]


@pytest.mark.skipif(triton.__version__ not in TABLE, reason=f"no rows of Triton {triton.__version__}")
@pytest.mark.parametrize("bug", SLOWER)
def test_a_slower_kernel_exceeds_its_limit(bug, tmp_path):
    entry_id, replacements = SLOWER[bug]
    entry = ENTRIES[entry_id]
    planted = with_replacements(MODULES[entry_id], replacements, tmp_path)
    slower = replace(entry, kernel=getattr(planted, entry.kernel.__name__))
    assert slower.hash() != entry.hash(), "the table's row would not be compiled again"
    assert per_product(compile_entry(slower, 90)) > STEP_LIMITS[entry_id]
