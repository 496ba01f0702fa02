"""Every tile size of the kernels, with its reason, and the heuristic that picks one. No timing decides here.

Channel counts are compile-time constants of the products and of the passes over activations, which would be 9 to 50 %
more instructions without, and up to 46 % more in a step of the loop. What works on vectors and weights takes them as
arguments: one program then serves all stages of a network, and nothing waits for the few instructions more.

A tile is chosen from channel counts alone, so a shape always runs the same program. Numbers that enter a
result (rows of a statistics tile, rows summed before a flush) are constants of their own, apart from tuning.
Registers, shared memory and spills of each entry on each architecture: tests/support/triton_resources.json.
"""

from typing import NamedTuple

# Rows whose statistics or backward sums one program forms. Equal to bm of every entry of the convolutions
# with such an epilogue, and a multiple of 8: tiles start at bit 0 of a mask byte for any channel count.
STATISTICS_ROWS = 128

# Rows of one program of the standalone reductions: [256, 32] float32 values are 32 registers a thread at 8
# warps, and partials of 12 bytes for every 256 rows add 2.3 % to the bytes of a bfloat16 tensor.
REDUCTION_ROWS = 256
REDUCTION_COLUMNS = 32
REDUCTION_WARPS = 8

# Partials merged by one program; a second round follows where there are more.
MERGE_ROWS = 256

# Rows sampled for the value that is subtracted from an activation before its products: it is off by 1/sqrt(512) = 4 %
# of a standard deviation.
GRAM_SAMPLE = 512
GRAM_SAMPLE_COLUMNS = 16


class GemmTile(NamedTuple):
    """Output tile [bm, bn], inner step bk, warps and pipeline stages."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


# [P, Cin] x [Cin, Cout]. bm is STATISTICS_ROWS throughout. 8 warps: with 4 the epilogue's mask and residual on 128
# accumulators a thread spill.
CONV1X1_FORWARD = (
    GemmTile(128, 32, 32, 4, 3),  # CIFAR bottlenecks: 16 and 32 channels
    GemmTile(128, 64, 64, 8, 3),  # 64 outputs (first stage): one column tile, x read once; 2 programs a SM
    GemmTile(128, 128, 64, 8, 3),  # the rest: 128 wide, so that x passes L2 only Cout/128 times
)

# [P, Cout] x [Cout, Cin], then [P, Cin] x [Cin, Cin], each with two terms of the weight; bm is STATISTICS_ROWS. Both
# terms of a step are in shared memory: with bk 64 they would take 144 KiB, and sm_86, sm_89 and sm_120 have 99.
CONV1X1_GRAM_BACKWARD_INPUT = (
    GemmTile(128, 32, 32, 4, 3),  # CIFAR bottlenecks
    GemmTile(128, 64, 32, 8, 3),  # 64 inputs: one column tile, dy and mask read once
    GemmTile(128, 128, 32, 8, 3),  # the rest: dy, the widest operand, is read Cin/128 times
)

# [P, Cout] x [Cout, Cin]; dy and c come with the prologue: bk 64 takes 247 registers, bk 32 takes 171.
CONV1X1_BACKWARD_INPUT = (
    GemmTile(128, 32, 32, 4, 3),  # CIFAR bottlenecks
    GemmTile(128, 64, 32, 8, 3),  # 64 inputs
    GemmTile(128, 128, 32, 8, 3),  # the rest
)

# The same product of a dc that was made before.
CONV1X1_PLAIN_BACKWARD_INPUT = (
    GemmTile(128, 64, 32, 8, 3),  # rows that are not aligned: with bk 64 they spill on Blackwell
    GemmTile(128, 128, 64, 8, 3),  # the rest: two programs a SM
)

# [Cout, rows] x [rows, Cin]: bm over Cout, bn over Cin, bk over rows.
CONV1X1_BACKWARD_WEIGHT = (
    GemmTile(32, 32, 64, 4, 3),  # CIFAR bottlenecks
    GemmTile(
        64, 64, 32, 4, 3
    ),  # operands and two sums in registers, up to 167: small tiles, three programs a SM
    GemmTile(128, 64, 32, 8, 3),  # wide layers: a is made again Cout/128 times instead of /64; bk 64 spills
)

# Programs that the splits of the weight gradient make up at most, unless the longest splits are more: nearly four for
# each of the 132 multiprocessors of an H100, which runs one at a time. As few splits as their own bytes would have are
# 128 programs in stages 3 and 4 of ResNet-50.
WEIGHT_PROGRAMS = 512
# A split's rows are a multiple of every bk above, and of the 8 rows whose bits end at a byte for any channel count.
WEIGHT_ROWS = 64

# [Cin, rows] x [rows, Cin] with float64 accumulators: 64 x 64 is the largest tile that does not spill.
GRAM = (
    GemmTile(32, 32, 64, 4, 3),  # CIFAR bottlenecks
    GemmTile(64, 64, 32, 4, 3),  # the rest
)

# Rows and columns that a program of the float64 algebra of Cout x Cin weights takes at a time: a few rows, or a few
# columns, all along. The fewer, the more programs share a layer (2048 x 512: 256 by rows, 32 by columns); a step
# is 8 or 16 float64 values a thread at 4 warps.
ALGEBRA_ROWS = (8, 128)
ALGEBRA_COLUMNS = (128, 16)

# Elements of a program of the elementwise kernels: four 16-byte loads of a 2-byte dtype a thread, at 4 warps.
ELEMENTWISE_BLOCK = 4096
ELEMENTWISE_COLUMNS = 128
ELEMENTWISE_WARPS = 4

# Positions and channels of a program of the pooling kernels; each position reads a window of 9 in the stem.
POOL_ROWS = 64
POOL_COLUMNS = 64
POOL_WARPS = 4


def aligned(*channels: int) -> bool:
    """Whether rows of these channel counts, of a 2-byte dtype, consist of 16-byte pieces."""
    return all(n % 8 == 0 for n in channels)


def output_tile(table: tuple[GemmTile, ...], columns: int, inner: int) -> GemmTile:
    """The first entry that covers `columns` with one column tile, or the widest; `inner`: the channels summed over.

    Rows that are not aligned come in 2, 4 or 8 bytes, which take more addresses: 128 columns of them spill.
    """
    usable = table if aligned(columns, inner) else tuple(tile for tile in table if tile.bn <= 64)
    return next((tile for tile in usable if tile.bn >= columns), usable[-1])


def dc_comes_first(cin: int, cout: int) -> bool:
    """Whether the input gradient's dc [P, Cout] is made by a pass of its own, not in every column tile of Cin.

    On sm_90 a warp takes 976 instructions for 64 channels of dc with the prologue, and 41 without. Made twice or four
    times, as in ResNet-50's first two stages, they are issued while the layer's bytes move; not so 8 and 16 times, as
    in the others, whose dc is small enough to be in L2 when the product asks for it.
    """
    return -(-cin // output_tile(CONV1X1_BACKWARD_INPUT, cin, cout).bn) > 4


def weight_tile(cout: int, cin: int) -> GemmTile:
    """The smallest for rows that are not aligned: beside the addresses two sums of 64 x 64 spill."""
    if max(cout, cin) <= 32 or not aligned(cout, cin):
        return CONV1X1_BACKWARD_WEIGHT[0]
    return CONV1X1_BACKWARD_WEIGHT[2 if cout >= 512 else 1]


def most_weight_rows(cin: int) -> int:
    """Rows of one split of the weight gradient at most: a float32 partial of 2*Cin/rows <= 3 % of dy's bytes."""
    return max(1024, 64 * power_of_two(cin))


def weight_rows(cout: int, cin: int, total: int) -> int:
    """Rows of one split of `total`, a multiple of 64: as many splits as make WEIGHT_PROGRAMS, or the longest ones.

    At least 4*Cin, so that the partials are never more than half of dy's bytes.
    """
    tile = weight_tile(cout, cin)
    splits = max(1, WEIGHT_PROGRAMS // (-(-cout // tile.bm) * -(-cin // tile.bn)))
    rows = max(-(-total // splits), 4 * cin, WEIGHT_ROWS)
    return min(-(-rows // WEIGHT_ROWS) * WEIGHT_ROWS, most_weight_rows(cin))


def gram_rows(cin: int, bn: int) -> int:
    """Rows of one split of the Gram product: float32 partials of at most 5 % of a's bytes in bfloat16."""
    tiles = -(-cin // bn)
    partial_bytes = 4 * bn * bn * tiles * (tiles + 1) // 2
    rows = partial_bytes * 20 // (2 * cin)
    return -(-rows // 512) * 512


def elementwise_tile(channels: int) -> tuple[int, int, int]:
    """Row width, rows and columns of an elementwise tile.

    A row's mask bits have to fill whole bytes: with `channels` no multiple of 8, eight positions are a row.
    """
    width = channels if channels % 8 == 0 else 8 * channels
    columns = min(ELEMENTWISE_COLUMNS, power_of_two(width))
    return width, ELEMENTWISE_BLOCK // columns, columns


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
