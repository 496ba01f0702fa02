"""nvcc's build of the CUDA kernels: no spills, wide loads, and the resources of the checked-in table."""

import re
from typing import NamedTuple

import cuda_main_loop
import cuda_resources
import pytest

pytestmark = pytest.mark.skipif(cuda_resources.nvcc_release() is None, reason="no nvcc here")

PRODUCT_KERNELS = (
    "conv_forward_kernel",
    "conv3x3_forward_kernel",
    "conv3x3_backward_input_kernel",
    "conv1x1_backward_input_kernel",
    "conv1x1_backward_weight_kernel",
    "gram_kernel",
    "conv1x1_gram_backward_input_kernel",
)


@pytest.fixture(scope="module")
def kernels():
    return cuda_resources.measure()


def test_no_kernel_spills(kernels):
    assert {k.arch for k in kernels} == set(cuda_resources.ARCHITECTURES)
    assert not [k for k in kernels if k.spill_bytes]


def test_bandwidth_kernels_load_16_bytes_at_a_time_and_two_ahead(kernels):
    no_products = [k for k in kernels if not k.products]
    by_packets = [
        k for k in no_products if re.search(r"<\w+, (8|true)\b", k.name) or k.name.startswith("relu_backward")
    ]
    assert len(by_packets) > len(no_products) / 3
    assert not [k for k in by_packets if k.loads_of_16_bytes < 2]


class Loops(NamedTuple):
    """Instructions for each product in the main loop of CUTLASS's implicit GEMMs of the same tile (csrc/README.md)."""

    forward: float
    forward_with_prologue: float
    backward_weight_with_prologue: float


CUTLASS = {
    "80": Loops(132 / 32, 265 / 32, 294 / 32),
    "90": Loops(136 / 32, 260 / 32, 290 / 32),
    "100": Loops(146 / 32, 303 / 32, 353 / 32),
}
# What the prologue of an input gradient has and no library's: it reads c beside dy. 16 values of a thread and step.
READING_C = (16 + 2) / 32
# Kernels for rows of whole packets, by CUTLASS's that does most of what they do.
COMPARED = {
    "forward": r"conv_forward_kernel<\w+, \d, true, false|conv3x3_\w+<\w+, true",
    "forward_with_prologue": r"conv_forward_kernel<\w+, \d, true, true|conv1x1_backward_input_kernel<\w+, true"
    r"|conv1x1_gram_backward_input_kernel<\w+, true",
    "backward_weight_with_prologue": r"gram_kernel<\w+, true|conv1x1_backward_weight_kernel<\w+, true",
}
# In registers of one block of a multiprocessor: operands that are loaded element by element, and a ReLU's scale that is
# another tensor than A
ALONE = re.compile(
    r"(gram|conv1x1_backward_\w+)_kernel<\w+, false|conv_forward_kernel<\w+, 3, false|.*true, true, Relu 2"
)


def test_products_run_on_tensor_cores(kernels):
    """A step of one tile, or a tap, is 32 products of a warp; three taps are unrolled; sums over rows are 2 more."""
    products = [k for k in kernels if k.products]
    assert {k.name.split("<")[0] for k in products} == set(PRODUCT_KERNELS)
    unrolled = {k.name for k in products if k.products == 96}
    assert unrolled == {k.name for k in products if re.match(r"conv3x3_\w+<\w+, true", k.name)}
    with_sums = {k.name for k in products if k.products == 34}
    assert with_sums == {
        k.name for k in products if k.name.startswith(("gram_kernel", "conv1x1_backward_weight"))
    }
    assert {k.products for k in products} == {32, 34, 96}
    assert all(k.products == k.loop_products for k in products)
    two_blocks = 65536 // (2 * 256)  # registers of a thread
    assert all(k.shared_bytes <= 48 << 10 for k in products)
    assert all(k.registers <= two_blocks for k in products if not ALONE.match(k.name))


@pytest.mark.parametrize("compared", COMPARED)
def test_main_loops_of_products_are_as_short_as_those_of_a_library(kernels, compared):
    ours = [k for k in kernels if re.match(COMPARED[compared], k.name) and not ALONE.match(k.name)]
    assert {k.arch for k in ours} == set(CUTLASS)
    too_long = []
    for k in ours:
        limit = 1.3 * getattr(CUTLASS[k.arch], compared)
        limit += READING_C if k.name.startswith("conv1x1_backward_input") else 0
        if k.loop_instructions / k.loop_products > limit:
            too_long.append(k)
    assert not too_long


def test_every_product_by_packets_is_compared(kernels):
    by_packets = {k.name for k in kernels if k.products and re.search(r"<\w+, (\d, )?true\b", k.name)}
    compared = {name for name in by_packets if any(re.match(p, name) for p in COMPARED.values())}
    assert compared == by_packets and by_packets


def test_the_disassembler_sees_the_same_instructions(kernels):
    """On each architecture, in one source with packets, one with tiles and one with products."""
    sources = "relu_backward.", "bn_stats.", "conv1x1_forward."
    cubins = [c for c in cuda_resources.compile_all() if c.name.startswith(sources)]
    assert len(cubins) == 3 * len(cuda_resources.ARCHITECTURES)
    for cubin in cubins:
        found = cuda_resources.counts(cubin.read_bytes())
        assert found == cuda_resources.disassembled_counts(cubin), cubin.name
        assert sum(sum(kernel.values()) for kernel in found.values()) > 0
        nvdisasm, arch = cuda_resources.toolkit_program("nvdisasm"), int(cubin.suffixes[0][1:])
        jumps = cuda_main_loop.disassembled_jumps(nvdisasm, cubin)
        for name, code in cuda_resources.instructions(cubin.read_bytes()).items():
            own = cuda_main_loop.loops(cuda_main_loop.jumps_of(code, arch))
            assert own == cuda_main_loop.loops(jumps[name]), (cubin.name, name)


def test_resources_are_those_of_the_table(kernels):
    release, table = cuda_resources.read_table()
    if release == cuda_resources.nvcc_release():
        assert kernels == table, "run `python tests/support/cuda_resources.py` and look at what changed"
    else:  # another compiler allocates otherwise
        assert [k[:2] for k in kernels] == [k[:2] for k in table]
