"""nvcc's build of the CUDA kernels: no spills, wide loads, and the resources of the checked-in table."""

import re

import cuda_resources
import pytest

pytestmark = pytest.mark.skipif(cuda_resources.nvcc_release() is None, reason="no nvcc here")

PRODUCT_KERNELS = (
    "conv_forward_kernel",
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
    by_packets = [
        k
        for k in kernels
        if not k.products and (re.search(r"<\w+, (8|true)\b", k.name) or k.name.startswith("relu_backward"))
    ]
    assert len(by_packets) > len(kernels) / 3
    assert not [k for k in by_packets if k.loads_of_16_bytes < 2]


def test_products_run_on_tensor_cores(kernels):
    """A step of one tile is 32 products of a warp, and nothing else is one."""
    products = [k for k in kernels if k.products]
    assert {k.name.split("<")[0] for k in products} == set(PRODUCT_KERNELS)
    assert {k.products for k in products} == {32}
    two_blocks = 65536 // (2 * 256)  # registers of a thread
    assert all(k.registers <= two_blocks and k.shared_bytes <= 48 << 10 for k in products)


def test_the_disassembler_sees_the_same_instructions(kernels):
    """On each architecture, in one source with packets, one with tiles and one with products."""
    sources = "relu_backward.", "bn_stats.", "conv1x1_forward."
    cubins = [c for c in cuda_resources.compile_all() if c.name.startswith(sources)]
    assert len(cubins) == 3 * len(cuda_resources.ARCHITECTURES)
    for cubin in cubins:
        found = cuda_resources.counts(cubin.read_bytes())
        assert found == cuda_resources.disassembled_counts(cubin), cubin.name
        assert sum(sum(kernel.values()) for kernel in found.values()) > 0


def test_resources_are_those_of_the_table(kernels):
    release, table = cuda_resources.read_table()
    if release == cuda_resources.nvcc_release():
        assert kernels == table, "run `python tests/support/cuda_resources.py` and look at what changed"
    else:  # another compiler allocates otherwise
        assert [k[:2] for k in kernels] == [k[:2] for k in table]
