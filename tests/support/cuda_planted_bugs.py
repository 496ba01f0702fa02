"""Bugs to plant in csrc/cuda, one at a time, each with what has to catch it."""

from __future__ import annotations

from typing import NamedTuple


class PlantedBug(NamedTuple):
    op: str  # that is compiled and checked
    file: str  # of csrc/cuda
    found: str  # text that stands there exactly once
    planted: str
    variant: str  # of the host build
    caught_by: str  # in what the run prints


RACE = "ThreadSanitizer: data race"
OVERFLOW = "AddressSanitizer: heap-buffer-overflow"
WRONG = "AssertionError"
HUGE = "beyond 2^31 elements"  # printed before that check, which comes last

BUGS = {
    "missing_barrier": PlantedBug(
        "bn_stats",
        "tile_reduce.h",
        "    __syncthreads();\n    if (row < rows - half) {",
        "    if (row < rows - half) {",
        "thread",
        RACE,
    ),
    "barrier_in_divergent_code": PlantedBug(
        "bn_stats",
        "tile_reduce.h",
        "    __syncthreads();\n    rows = half;",
        "    if (row < rows - half) __syncthreads();\n    rows = half;",
        "plain",
        "__syncthreads",
    ),
    "missing_fence_before_the_counter": PlantedBug(
        "bn_stats",
        "tile_reduce.h",
        "  __threadfence();\n  FUSEDRES_SHARED",
        "  FUSEDRES_SHARED",
        "thread",
        RACE,
    ),
    "missing_fence_after_the_counter": PlantedBug(
        "bn_stats",
        "tile_reduce.h",
        "  __threadfence();\n  if (threadIdx.x == 0) atomicExch",
        "  if (threadIdx.x == 0) atomicExch",
        "thread",
        RACE,
    ),
    "counter_left_behind": PlantedBug(
        "bn_stats",
        "tile_reduce.h",
        "  if (threadIdx.x == 0) atomicExch(counter, 0u);\n",
        "",
        "plain",
        WRONG,
    ),
    "merge_in_order_of_arrival": PlantedBug(
        "bn_stats",
        "tile_reduce.h",
        "partials + int64_t(from) * plan.partial_floats(N) +",
        "partials + int64_t((from + int(blockIdx.y)) % plan.groups) * plan.partial_floats(N) +",
        "plain",
        WRONG,
    ),
    "uninitialised_shared_memory": PlantedBug(
        "bn_stats",
        "tile_reduce.h",
        "if (row >= half && row < rows) {",
        "if (row > half && row < rows) {",
        "plain",
        WRONG,
    ),
    "write_past_shared_memory": PlantedBug(
        "bn_stats",
        "tile_reduce.h",
        "Values * kTileThreads / 2;",
        "Values * kTileThreads / 4;",
        "address",
        OVERFLOW,
    ),
    "read_past_the_last_row": PlantedBug(
        "bn_stats",
        "bn_stats.cu",
        "me.row, plan.row_stride(), plan.rows,",
        "me.row, plan.row_stride(), plan.rows + 1,",
        "address",
        OVERFLOW,
    ),
    "misaligned_vector_load": PlantedBug(
        "bn_stats",
        "bn_stats.cu",
        "shape.channels % kPacket == 0 && aligned_to_16(args.c);",
        "shape.channels % kPacket == 0;",
        "plain",
        "misaligned vector access",
    ),
    "store_off_by_one": PlantedBug(
        "bn_add_relu_forward",
        "bn_add_relu_forward.cu",
        "args.mask[packet] =",
        "args.mask[packet + 1] =",
        "address",
        OVERFLOW,
    ),
    "wrong_tail_mask": PlantedBug(
        "bn_add_relu_forward",
        "walk.h",
        "(1u << left) - 1u",
        "(1u << (left - 1)) - 1u",
        "plain",
        WRONG,
    ),
    "relu_drops_nan": PlantedBug(
        "bn_add_relu_forward",
        "bn_math.h",
        "return !(rounded <= 0.f);",
        "return rounded > 0.f;",
        "plain",
        WRONG,
    ),
    "index_in_32_bits": PlantedBug(
        "relu_backward",
        "walk.h",
        "  const int64_t first = packet * kPacket;\n  if constexpr (kFixed) {\n    return",
        "  const int first = int(packet * kPacket);\n  if constexpr (kFixed) {\n    return",
        "plain",
        HUGE,  # then a crash or wrong values, by what lies 4 GiB below
    ),
    "pooling_window_too_wide": PlantedBug(
        "bn_relu_maxpool_backward_input",
        "pooling.h",
        "in_window_x >= window.kernel",
        "in_window_x > window.kernel",
        "plain",
        WRONG,
    ),
    "refilled_ring": PlantedBug(
        "conv1x1_forward",
        "product.h",
        "after = next == kRing - 1 ? 0 : next + 1;",
        "after = next;",
        "plain",
        WRONG,
    ),
    "refill_before_the_barrier": PlantedBug(
        "conv1x1_forward",
        "product.h",
        "    __syncthreads();  // this step is prepared, and",
        "    start(step + 2, after);\n    __syncthreads();  // this step is prepared, and",
        "thread",
        RACE,
    ),
    "wait_too_weak": PlantedBug(
        "conv1x1_forward",
        "product.h",
        "    wait_for_copies<1>();\n    if (step + 1 < steps)",
        "    wait_for_copies<2>();\n    if (step + 1 < steps)",
        "plain",
        WRONG,
    ),
    "half_a_warp": PlantedBug(
        "conv1x1_forward",
        "product.h",
        "      load_matrices<Left::kTransposed>(a,",
        "      if (lane < 16) load_matrices<Left::kTransposed>(a,",
        "plain",
        "meet in different instructions",
    ),
    "copies_in_flight_at_the_end": PlantedBug(
        "conv1x1_forward",
        "product.h",
        "  wait_for_copies<0>();\n",
        "  start(0, 0);\n",
        "plain",
        "asynchronous copies",
    ),
    "next_tile_before_the_last_is_stored": PlantedBug(
        "conv1x1_forward",
        "conv_forward.h",
        "    __syncthreads();  // the tile before this one",
        "    // the tile before this one",
        "plain",
        WRONG,
    ),
    "statistics_over_padded_rows": PlantedBug(
        "conv1x1_forward",
        "product_output.h",
        "if (staged_tile_row(staged_row, half) < rows) sums.add",
        "sums.add",
        "plain",
        WRONG,
    ),
    "missing_fence_of_partial_moments": PlantedBug(
        "conv1x1_forward",
        "product_output.h",
        "  __threadfence();\n  __syncthreads();",
        "  __syncthreads();",
        "thread",
        RACE,
    ),
    "prologue_of_another_step": PlantedBug(
        "conv1x1_backward_input",
        "conv1x1_backward_input.cu",
        "fetch(step + 1);",
        "fetch(step);",
        "plain",
        WRONG,
    ),
    "shortcut_through_other_bits": PlantedBug(
        "conv1x1_backward_input",
        "product.h",
        "return bits >> first;",
        "return bits;",
        "plain",
        WRONG,
    ),
    "sums_cut_off_by_tensor_cores": PlantedBug(
        "conv1x1_backward_weight",
        "rows_product.h",
        "multiply_add<T>(part, a[k]",
        "multiply_add<T>(acc.value[i][j], a[k]",
        "plain",
        WRONG,
    ),
    "rows_past_the_end_are_activated": PlantedBug(
        "gram",
        "rows_product.h",
        "me.row_of(i) >= rows) continue;",
        "me.row_of(i) >= rows + kProductDepth) continue;",
        "plain",
        WRONG,
    ),
    "half_of_a_symmetric_product": PlantedBug(
        "gram",
        "gram.cu",
        "int64_t(i < j ? i : j) * plan.left + (i < j ? j : i);",
        "int64_t(i) * plan.left + j;",
        "plain",
        WRONG,
    ),
    "rows_of_a_split_left_out": PlantedBug(
        "conv1x1_backward_weight",
        "conv1x1_backward_weight.cu",
        "int(ceil_div(rows, kProductDepth)),",
        "rows / kProductDepth,",
        "plain",
        WRONG,
    ),
    "padding_not_zero": PlantedBug(
        "conv3x3_forward",
        "conv_forward.h",
        "if (kWindow == 1 || has_position(i, tap)) activate_chunk(",
        "if (tap >= 0) activate_chunk(",
        "plain",
        WRONG,
    ),
    "wrong_tap": PlantedBug(
        "conv3x3_forward",
        "conv_forward.h",
        "tap / kWindow * args.width.in + tap % kWindow;",
        "tap % kWindow * args.width.in + tap / kWindow;",
        "plain",
        WRONG,
    ),
}
