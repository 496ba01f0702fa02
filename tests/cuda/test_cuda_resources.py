"""nvcc's build of the CUDA kernels: no spills, wide loads, and the resources of the checked-in table."""

import re

import cuda_resources
import pytest

pytestmark = pytest.mark.skipif(cuda_resources.nvcc_release() is None, reason="no nvcc here")


@pytest.fixture(scope="module")
def kernels():
    return cuda_resources.measure()


def test_no_kernel_spills(kernels):
    assert {k.arch for k in kernels} == set(cuda_resources.ARCHITECTURES)
    assert not [k for k in kernels if k.spill_bytes]


def test_bandwidth_kernels_load_16_bytes_at_a_time_and_two_ahead(kernels):
    by_packets = [
        k for k in kernels if re.search(r"<\w+, (8|true)\b", k.name) or k.name.startswith("relu_backward")
    ]
    assert len(by_packets) > len(kernels) / 3
    assert not [k for k in by_packets if k.loads_of_16_bytes < 2]


def test_the_disassembler_sees_the_same_wide_loads(kernels):
    """On each architecture, in one source with packets and one with tiles."""
    cubins = [c for c in cuda_resources.compile_all() if c.name.startswith(("relu_backward", "bn_stats"))]
    assert len(cubins) == 2 * len(cuda_resources.ARCHITECTURES)
    for cubin in cubins:
        loads = cuda_resources.disassembled_wide_loads(cubin)
        assert loads == cuda_resources.wide_loads(cubin.read_bytes()), cubin.name
        assert sum(loads.values()) > 0


def test_resources_are_those_of_the_table(kernels):
    release, table = cuda_resources.read_table()
    if release == cuda_resources.nvcc_release():
        assert kernels == table, "run `python tests/support/cuda_resources.py` and look at what changed"
    else:  # another compiler allocates otherwise
        assert [k[:2] for k in kernels] == [k[:2] for k in table]
