"""What each way to run a training step launches: data for `roofline.py`, and nothing else.

A line is (where, kernel, reads, writes, work). `where` is a set of tags that must all hold; a line is
launched once for every convolution, or once a block (`join`), that has them:

    conv         every convolution of a block: main (first or upper, inner or last) or shortcut
    1x1 kxk      its kernel;   strided plain: whether it has a stride
    few_tiles many_tiles     a 1x1 whose input gradient makes dc as it goes, or has it made by a pass of its own
    join         once a block, where the shortcut meets the main branch; c is then the last convolution's
    identity projection      the block's shortcut;   opening later, earlier final: the first, the last block
    stem         the first convolution;   pool: behind it, where the network pools there, else unpooled

Tensors: x, y the block's input and output; in, c, a a convolution's input, raw output, activation; below the
raw output below it (the size of in); sampled the pixels of in that a strided 1x1 touches; s the projection's
raw output; w, dw its weight and float32 weight gradient; mask one bit per element of y; d<name> the gradient
of <name>, dz where it enters BN; at the stem p the pooled output, index8 and index1 its indices in 8 bytes
and in 1. `~` marks a second read that finds a small tensor still in the L2 cache.
Work: conv, the convolution's multiply-adds; gram, the symmetric half of a^T a; square, a Cin x Cin product.
"""

from __future__ import annotations

from typing import NamedTuple

Line = tuple[str, str, str, str, str]

# what is launched besides, on vectors and weights, where our own kernels run: of next to no bytes
ALGEBRA: tuple[Line, ...] = (
    ("conv", "bn_scale_shift", "", "", ""),
    ("conv", "memset, of the statistics' counters", "", "", ""),
    ("conv", "bn_backward_coefficients", "", "", ""),
    ("join", "bn_running_stats", "", "", ""),
    ("join", "cast, of weights", "", "", ""),
    ("join", "cast, of their gradients", "", "", ""),
    ("join", "memset, of the sums' counters", "", "", ""),
    ("inner", "memset, of the sums' counters", "", "", ""),
    ("shortcut", "copy of a sum that two BNs share", "", "", ""),
)

LIBRARY_FORWARD: tuple[Line, ...] = (("conv", "convolution", "sampled w", "c", "conv"),)
LIBRARY_BACKWARD: tuple[Line, ...] = (
    ("conv", "convolution_backward_input", "dc w", "din", "conv"),
    ("conv", "convolution_backward_weight", "dc sampled", "dw", "conv"),
)
WEIGHT_GRADIENT: tuple[Line, ...] = (("conv", "convolution_backward_weight", "dc sampled", "dw", "conv"),)

# every operation a kernel of its own
UNFUSED: tuple[Line, ...] = (
    *LIBRARY_FORWARD,
    ("conv", "bn_stats", "c", "", ""),
    ("conv", "bn_apply", "c", "c", ""),
    ("inner", "relu", "a", "a", ""),
    ("join", "add", "y x_or_s", "y", ""),
    ("join", "relu", "y", "y", ""),
    ("join", "relu_backward", "dy y", "dz", ""),
    ("inner", "relu_backward", "da a", "dz", ""),
    ("conv", "bn_backward_reduce", "dz c", "", ""),
    ("conv", "bn_backward_input", "dz c", "dc", ""),
    *LIBRARY_BACKWARD,
    ("join", "add_gradients", "dx dx", "dx", ""),
)

# pointwise operations and reductions fused by a compiler that sees the whole graph
INDUCTOR: tuple[Line, ...] = (
    *LIBRARY_FORWARD,
    ("conv", "bn_stats", "c", "", ""),
    ("inner", "bn_relu", "c", "a", ""),
    ("join", "bn_add_relu", "c x_or_s", "y", ""),
    ("join earlier", "join_backward_reduce", "dy dy y c", "dz", ""),
    ("join final", "join_backward_reduce", "dy y c", "dz", ""),
    ("shortcut", "join_backward_reduce, projection", "c", "", ""),
    ("join", "join_backward_input", "dz c", "dc", ""),
    ("shortcut", "join_backward_input, projection", "c", "dc", ""),
    ("inner", "bn_relu_backward_reduce", "da a c", "", ""),
    ("inner", "bn_relu_backward_input", "da a c", "dc", ""),
    *LIBRARY_BACKWARD,
)

# our BN kernels round library convolutions, one autograd Function a block
SEPARATE_BACKWARD: tuple[Line, ...] = (
    ("join identity", "bn_add_relu_backward_reduce", "dy mask c", "", ""),
    ("join identity", "bn_add_relu_backward_input", "~dy mask ~c", "dc dz", ""),
    ("join projection", "bn_add_relu_backward_reduce", "dy mask c s", "", ""),
    ("join projection", "bn_add_relu_backward_input", "~dy mask ~c ~s", "dc ds", ""),
    ("inner", "bn_add_relu_backward_reduce", "da c", "", ""),
    ("inner", "bn_add_relu_backward_input", "~da ~c", "dc", ""),
    *LIBRARY_BACKWARD,
    ("join", "add_gradients", "dx dx", "dx", ""),
    *ALGEBRA,
)
SEPARATE: tuple[Line, ...] = (
    *LIBRARY_FORWARD,
    ("conv", "bn_stats", "c", "", ""),
    ("inner", "bn_add_relu_forward", "~c", "a", ""),
    ("join", "bn_add_relu_forward", "~c x_or_s", "y mask", ""),
    *SEPARATE_BACKWARD,
)
# the same, statistics of plain 1x1 convolutions from a product of our own
SEPARATE_PRODUCT_STATS: tuple[Line, ...] = (
    ("1x1 plain", "conv1x1_forward", "in w", "c", "conv"),
    ("1x1 strided", "convolution", "sampled w", "c", "conv"),
    ("1x1 strided", "bn_stats", "c", "", ""),
    ("kxk", "convolution", "in w", "c", "conv"),
    ("kxk", "bn_stats", "c", "", ""),
    ("inner 1x1", "bn_add_relu_forward", "c", "a", ""),
    ("inner kxk", "bn_add_relu_forward", "~c", "a", ""),
    ("join", "bn_add_relu_forward", "c x_or_s", "y mask", ""),
    *SEPARATE_BACKWARD,
)
SEPARATE_EPILOGUE_STATS: tuple[Line, ...] = (
    *LIBRARY_FORWARD,
    ("inner", "bn_add_relu_forward", "c", "a", ""),
    ("join", "bn_add_relu_forward", "c x_or_s", "y mask", ""),
    *SEPARATE_BACKWARD,
)

# no inner activation stored: prologues of plain 3x3 convolutions of our own, and BN's backward in those without stride
PROLOGUE_EDGES: tuple[Line, ...] = (
    ("main kxk", "conv3x3_forward", "in w", "c", "conv"),
    ("main 1x1", "conv1x1_forward", "in w", "c", "conv"),
    ("shortcut plain", "conv1x1_forward", "in w", "c", "conv"),
    ("shortcut strided", "convolution", "sampled w", "c", "conv"),
    ("shortcut strided", "bn_stats", "c", "", ""),
    ("join", "bn_add_relu_forward", "c x_or_s", "y mask", ""),
    ("join identity", "bn_add_relu_backward_reduce", "dy mask c", "", ""),
    ("join projection", "bn_add_relu_backward_reduce", "dy mask c s", "", ""),
    ("join projection", "bn_add_relu_backward_input", "~dy mask ~c ~s", "dc ds", ""),
    ("main last", "convolution_backward_input", "dc w", "din", "conv"),
    ("main upper", "bn_add_relu_forward, for the weight gradient", "in", "in", ""),
    ("inner", "bn_add_relu_backward_reduce", "da c", "", ""),
    ("inner kxk plain projection", "conv3x3_backward_input", "~da ~c w", "din dc", "conv"),
    ("inner kxk strided", "bn_add_relu_backward_input", "~da ~c", "dc", ""),
    ("inner kxk strided", "convolution_backward_input", "dc w", "din", "conv"),
    ("inner 1x1", "bn_add_relu_backward_input", "~da ~c", "dc", ""),
    ("inner 1x1", "convolution_backward_input", "dc w", "din", "conv"),
    ("shortcut", "convolution_backward_input", "dc w", "din", "conv"),
    ("join projection", "add_gradients", "dx dx", "dx", ""),
    *WEIGHT_GRADIENT,
    *ALGEBRA,
)
PROLOGUE_BASIC: tuple[Line, ...] = (
    *PROLOGUE_EDGES,
    ("join identity", "bn_add_relu_backward_input", "~dy mask ~c", "dc", ""),
    ("inner kxk plain identity", "conv3x3_backward_input", "~da ~c w dy mask", "din dc", "conv"),
)
PROLOGUE_BOTTLENECK: tuple[Line, ...] = (
    *PROLOGUE_EDGES,
    ("join identity", "bn_add_relu_backward_input", "~dy mask ~c", "dc dz", ""),
    ("inner kxk plain identity", "conv3x3_backward_input", "~da ~c w", "din dc", "conv"),
    ("join identity", "add_gradients", "dx dx", "dx", ""),
)

# our 1x1 forward and input gradient; library kxk and weight gradients on side outputs; one Function a block
FUSED_1X1: tuple[Line, ...] = (
    ("1x1 first", "conv1x1_forward", "in w", "c", "conv"),
    ("1x1 last", "conv1x1_forward", "below w", "c in", "conv"),
    ("1x1 shortcut", "conv1x1_forward", "sampled w", "c", "conv"),
    ("main kxk", "bn_add_relu_forward", "below", "in", ""),
    ("main kxk", "convolution", "in w", "c", "conv"),
    ("main kxk", "bn_stats", "c", "", ""),
    ("join", "bn_add_relu_forward", "c x_or_s", "y mask", ""),
    ("join identity", "join_backward", "dy mask c", "dz", ""),
    ("join projection", "join_backward", "dy mask c s", "dz", ""),
    ("main 1x1 last", "conv1x1_backward_input", "dz c w below", "din dc", "conv"),
    ("main kxk", "bn_add_relu_backward_input", "dz c", "dc", ""),
    ("main kxk", "convolution_backward_input", "dc w", "din", "conv"),
    ("main kxk", "bn_add_relu_backward_reduce", "din below", "", ""),
    ("shortcut", "conv1x1_backward_input", "dz c w", "sampled dc", "conv"),
    ("main 1x1 first identity", "conv1x1_backward_input", "da c w dy", "dx dc", "conv"),
    ("main 1x1 first projection", "conv1x1_backward_input", "da c w shortcut_dx", "dx dc", "conv"),
    *WEIGHT_GRADIENT,
)

# prologues and epilogues everywhere, across blocks: the join in the next convolution, sums in epilogues
ACROSS_BLOCKS: tuple[Line, ...] = (
    ("first opening", "convolution", "in w", "c", "conv"),
    ("first later", "convolution, the join below in its prologue", "x x w", "x mask_x c", "conv"),
    ("upper", "convolution", "below w", "c", "conv"),
    ("shortcut", "convolution", "sampled w", "c", "conv"),
    ("join final", "bn_add_relu_forward", "c x_or_s", "y mask", ""),
    ("join final", "join_backward", "dy mask c", "dz", ""),
    ("upper", "convolution_backward_input", "dz c w below", "din", "conv"),
    ("shortcut", "convolution_backward_input", "dz c w", "sampled", "conv"),
    ("first identity", "convolution_backward_input", "dz c w dz_y x mask_x", "dx", "conv"),
    ("first projection later", "convolution_backward_input", "dz c w shortcut_dx x mask_x", "dx", "conv"),
    ("first projection opening", "convolution_backward_input", "dz c w shortcut_dx", "dx", "conv"),
    ("conv", "convolution_backward_weight", "dz c sampled", "dw", "conv"),
)

# the Gram identity: the last convolution's raw output never exists; library kxk
GRAM_OWN_FORWARD: tuple[Line, ...] = (
    ("first 1x1", "conv1x1_forward", "in w", "c", "conv"),
    ("shortcut plain", "conv1x1_forward", "in w", "c", "conv"),
    ("shortcut strided", "convolution", "sampled w", "c", "conv"),
    ("shortcut strided", "bn_stats", "c", "", ""),
)
# where nobody has measured our products against the library's
GRAM_LIBRARY_FORWARD: tuple[Line, ...] = (
    ("first", "convolution", "in w", "c", "conv"),
    ("first", "bn_stats", "c", "", ""),
    ("shortcut", "convolution", "sampled w", "c", "conv"),
    ("shortcut", "bn_stats", "c", "", ""),
)
GRAM_ALGEBRA: tuple[Line, ...] = (
    ("conv", "bn_scale_shift", "", "", ""),
    ("inner", "memset, of the statistics' counters", "", "", ""),
    ("first", "memset, of the sums' counters", "", "", ""),
    ("inner", "bn_backward_coefficients", "", "", ""),
    ("shortcut", "memset, of the statistics' counters", "", "", ""),
    ("shortcut", "memset, of the sums' counters", "", "", ""),
    ("shortcut", "bn_backward_coefficients", "", "", ""),
    ("join", "bn_running_stats", "", "", ""),
    ("join", "cast, of weights", "", "", ""),
    ("join", "cast, of their gradients", "", "", ""),
    ("last", "gram_reference", "", "", ""),
    ("last", "gram_finish", "", "", ""),
    *(("last", f"{operand}, in float64", "", "", "") for operand in ("weight", "weight, again", "moments")),
    *(("last", f"product of weights {i}", "", "", "") for i in (1, 2, 3)),
    ("last", "gram_output_stats", "", "", ""),
    ("last", "pivot", "", "", ""),
    ("last", "gram_bn_backward", "", "", ""),
    ("last", "gram_weight_gradient", "", "", ""),
    ("last", "gram_offset", "", "", ""),
    *(("last", f"split_weight, term {i}", "", "", "") for i in (1, 2)),
    *(("last", f"merge_sums {i}", "", "", "") for i in (1, 2, 3, 4, 5)),
)
GRAM_EDGES: tuple[Line, ...] = (
    ("last", "gram", "below", "", "gram"),
    ("last", "conv1x1_forward", "below w x_or_s", "y mask", "conv"),
    ("last", "conv1x1_backward_weight", "dy mask below", "dw", "conv"),
    ("last", "conv1x1_gram_backward_input", "dy mask below w", "din", "conv conv square square"),
    ("shortcut", "bn_add_relu_backward_reduce", "dy mask c", "", ""),
    ("shortcut", "bn_add_relu_backward_input", "~dy mask ~c", "dc", ""),
    ("shortcut", "convolution_backward_input", "dc w", "din", "conv"),
    ("shortcut", "convolution_backward_weight", "dc sampled", "dw", "conv"),
    ("inner", "convolution_backward_weight", "dc in", "dw", "conv"),
    ("first 1x1 few_tiles identity", "conv1x1_backward_input", "dz c w dy mask", "dx dc", "conv"),
    ("first 1x1 few_tiles projection", "conv1x1_backward_input", "dz c w dx", "dx dc", "conv"),
    ("first 1x1 many_tiles", "bn_add_relu_backward_input", "dz c", "dc", ""),
    ("first 1x1 many_tiles identity", "conv1x1_backward_input", "~dc w dy mask", "dx", "conv"),
    ("first 1x1 many_tiles projection", "conv1x1_backward_input", "~dc w dx", "dx", "conv"),
)
GRAM_LIBRARY_KXK: tuple[Line, ...] = (
    ("inner kxk", "bn_add_relu_forward", "below", "in", ""),
    ("inner kxk", "convolution", "in w", "c", "conv"),
    ("inner kxk", "bn_stats", "c", "", ""),
    ("inner kxk", "bn_add_relu_forward, again", "below", "in", ""),
    ("inner kxk", "bn_add_relu_backward_input", "dz c", "dc", ""),
    ("inner kxk", "convolution_backward_input", "dc w", "din", "conv"),
    ("inner kxk", "bn_add_relu_backward_reduce", "din below", "", ""),
)
GRAM_OWN_KXK: tuple[Line, ...] = (
    ("inner kxk", "conv3x3_forward", "below w", "c", "conv"),
    ("inner kxk", "bn_add_relu_forward, for the weight gradient", "below", "in", ""),
    ("inner kxk", "conv3x3_backward_input", "dz c w below", "din dc", "conv"),
)

STEM_EDGES: tuple[Line, ...] = (
    ("stem", "convolution", "in w", "c", "conv"),
    ("stem", "bn_stats", "c", "", ""),
    ("stem", "convolution_backward_weight", "dc in", "dw", "conv"),
)
STEM_UNFUSED: tuple[Line, ...] = (
    *STEM_EDGES,
    ("stem", "bn_apply", "c", "c", ""),
    ("stem", "relu", "c", "c", ""),
    ("pool", "max_pool", "c", "p index8", ""),
    ("pool", "max_pool_backward", "dp index8", "dc", ""),
    ("stem", "relu_backward", "dc c", "dz", ""),
    ("stem", "bn_backward_reduce", "dz c", "", ""),
    ("stem", "bn_backward_input", "dz c", "dc", ""),
)
STEM_INDUCTOR: tuple[Line, ...] = (
    *STEM_EDGES,
    ("stem", "bn_relu", "c", "a", ""),
    ("pool", "max_pool", "a", "p index1", ""),
    ("pool", "max_pool_relu_backward_reduce", "dp dp index1 a c", "", ""),
    ("pool", "max_pool_relu_backward_input", "dp dp index1 a c", "dc", ""),
    ("unpooled", "bn_relu_backward_reduce", "da da a c", "", ""),
    ("unpooled", "bn_relu_backward_input", "da da a c", "dc", ""),
)
STEM_FUSED: tuple[Line, ...] = (
    *STEM_EDGES,
    ("stem", "bn_scale_shift", "", "", ""),
    ("stem", "memset, of the statistics' counters", "", "", ""),
    ("stem", "memset, of the sums' counters", "", "", ""),
    ("stem", "bn_backward_coefficients", "", "", ""),
    ("stem", "bn_running_stats", "", "", ""),
    ("stem", "cast, of weights", "", "", ""),
    ("stem", "cast, of their gradients", "", "", ""),
    ("pool", "bn_relu_maxpool_forward", "~c", "p index1", ""),
    ("pool", "bn_relu_maxpool_backward_reduce", "dp index1 c", "", ""),
    ("pool", "bn_relu_maxpool_backward_input", "dp index1 ~c", "dc", ""),
    ("unpooled", "bn_add_relu_forward", "~c", "a", ""),
    ("unpooled", "bn_add_relu_backward_reduce", "da c", "", ""),
    ("unpooled", "bn_add_relu_backward_input", "~da ~c", "dc", ""),
)


class Schedule(NamedTuple):
    stem: tuple[Line, ...]
    expansion: tuple[Line, ...]  # blocks that end in an expanding 1x1 convolution
    other: tuple[Line, ...]


SCHEDULES = {
    "unfused": Schedule(STEM_UNFUSED, UNFUSED, UNFUSED),
    "inductor": Schedule(STEM_INDUCTOR, INDUCTOR, INDUCTOR),
    "separate": Schedule(STEM_FUSED, SEPARATE, SEPARATE),
    "separate_product_stats": Schedule(STEM_FUSED, SEPARATE_PRODUCT_STATS, SEPARATE_PRODUCT_STATS),
    "separate_epilogue_stats": Schedule(STEM_FUSED, SEPARATE_EPILOGUE_STATS, SEPARATE_EPILOGUE_STATS),
    "prologue": Schedule(STEM_FUSED, PROLOGUE_BOTTLENECK, PROLOGUE_BASIC),
    "fused_1x1": Schedule(STEM_FUSED, FUSED_1X1, SEPARATE),
    "across_blocks": Schedule(STEM_FUSED, ACROSS_BLOCKS, ACROSS_BLOCKS),
    "gram": Schedule(
        STEM_FUSED, (*GRAM_LIBRARY_FORWARD, *GRAM_EDGES, *GRAM_LIBRARY_KXK, *GRAM_ALGEBRA), SEPARATE
    ),
    "gram_own_1x1": Schedule(STEM_FUSED, (*GRAM_OWN_FORWARD, *GRAM_EDGES, *GRAM_LIBRARY_KXK), SEPARATE),
    "gram_own_3x3": Schedule(STEM_FUSED, (*GRAM_OWN_FORWARD, *GRAM_EDGES, *GRAM_OWN_KXK), SEPARATE),
}
