"""nvcc's build of the CUDA kernels: no spills, wide loads, and the resources of the checked-in table."""

import re

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


# Instructions for each product in the main loop of CUTLASS's implicit GEMM of the same tile, with and without a
# prologue, by nvcc 13.0 for sm_80 (csrc/README.md).
CUTLASS, CUTLASS_WITH_PROLOGUE = 149 / 32, 265 / 32


def test_products_run_on_tensor_cores(kernels):
    """A step of one tile, or a tap, is 32 products of a warp, and nothing else is one; three taps are unrolled."""
    products = [k for k in kernels if k.products]
    assert {k.name.split("<")[0] for k in products} == set(PRODUCT_KERNELS)
    unrolled = {k.name for k in products if k.products == 96}
    assert unrolled == {k.name for k in products if re.match(r"conv3x3_\w+<\w+, true", k.name)}
    assert {k.products for k in products} == {32, 96} and all(k.products == k.loop_products for k in products)
    two_blocks = 65536 // (2 * 256)  # registers of a thread
    assert all(k.registers <= two_blocks and k.shared_bytes <= 48 << 10 for k in products)


def test_main_loops_of_convolutions_are_as_short_as_those_of_a_library(kernels):
    """Those by packets: the forward, and what has its prologue outside the loop; 1x1 ones with a prologue too."""
    plain = re.compile(r"conv_forward_kernel<\w+, \d, true, false|conv3x3_\w+<\w+, true")
    loops = {k: k.loop_instructions / k.loop_products for k in kernels if k.loop_products}
    short = {k.name for k, ratio in loops.items() if plain.match(k.name) and ratio <= 1.3 * CUTLASS}
    assert short == {k.name for k in loops if plain.match(k.name)}
    prologue = [k for k in loops if re.match(r"conv_forward_kernel<\w+, 1, true, true", k.name)]
    assert prologue and all(loops[k] <= 1.3 * CUTLASS_WITH_PROLOGUE for k in prologue)


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
