"""The CUDA kernels on the CPU, by the checks that every backend has to pass."""

from dataclasses import replace

import cuda_host_build
import pytest
import torch
from cuda_host_cases import GROUPS, OPS, SEEDS, dtypes_of, host_cases
from cuda_host_checks import check_folded, check_order, check_shared
from cuda_host_list_checks import LIST_CHECKS
from cuda_host_ops import HostCudaOps
from every_raw_op import CHECKS
from raw_op_cases import Case, Inputs

from fusedres.ops.contract import BnAddReluForward
from fusedres.ops.reference import pack_mask

pytestmark = [
    pytest.mark.skipif(cuda_host_build.cuda_include() is None, reason="no CUDA headers here"),
    pytest.mark.no_cover,  # it is of C++, and of the reference, which others call
]

CASES = [
    pytest.param(op, case, place, id=f"{op}-{case}")
    for op in OPS
    for place, case in enumerate(host_cases(op))
]


@pytest.fixture(scope="module")
def ops():
    made = HostCudaOps(cuda_host_build.load(cuda_host_build.build("plain")))
    made.module.set_device(4, 1 << 16)
    return made


@pytest.mark.parametrize(("op", "case", "place"), CASES)
@pytest.mark.filterwarnings("ignore:var_mean")
def test_op(ops, op, case, place):
    """In every dtype, each in another order of threads and blocks: over the cases of an op, each dtype in all."""
    for i, dtype in enumerate(dtypes_of(op, case)):
        ops.module.seed(SEEDS[(place + i) % len(SEEDS)])
        CHECKS[op](ops, replace(case, dtype=dtype))


@pytest.mark.parametrize("op", LIST_CHECKS)
def test_op_of_several_tensors(ops, op):
    for seed in SEEDS:
        ops.module.seed(seed)
        LIST_CHECKS[op](ops, "plain")


@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_results_do_not_depend_on_the_order_of_threads_and_blocks(ops, case):
    check_order(ops, case)


@pytest.mark.parametrize("case", (*GROUPS, Case("C17", (2, 17, 3, 5))), ids=str)
def test_vectors_of_the_last_block_equal_those_of_the_separate_kernels(ops, case):
    check_folded(ops, case)


@pytest.mark.parametrize("channels", (1, 3, 17, 24))
def test_mask_bits_past_the_last_element_are_zero(ops, channels):
    inputs = Inputs(Case("tail", (1, channels, 3, 7)))
    c = inputs.c()
    y, mask = ops(BnAddReluForward(c, torch.ones(channels), torch.ones(channels), save_mask=True))
    assert torch.equal(mask, pack_mask(~(y <= 0)))


def test_a_workspace_that_is_too_small_is_an_error(ops):
    c = Inputs(GROUPS[0]).c()
    mean, var = torch.empty(256), torch.empty(256)
    args = ops._args("BnStats", shape=ops._shape(c), c=c, mean=mean, var=var)
    size = ops.module.bn_stats_workspace(ops._shape(c))
    memory = torch.zeros(size, dtype=torch.uint8)
    cuda_error_invalid_value = 1
    assert size > 512
    for short in (0, 512):  # of the counters alone, for example
        workspace = ops._args("Workspace", data=memory, bytes=short, zero_bytes=0)
        assert ops.module.bn_stats(args, workspace) == cuda_error_invalid_value


def test_launches_on_one_stream_share_a_workspace(ops):
    check_shared(ops)


@pytest.mark.parametrize("window", [(16, 2, 1), (3, 2, 2), (3, 0, 1), (9, 1, 0), (3, 1, -1)], ids=str)
def test_a_window_that_no_kernel_takes_is_an_error(ops, window):
    c = Inputs(GROUPS[0]).c()  # 5 x 9
    for op, struct in (("forward", "Forward"), ("backward_input", "BackwardInput")):
        with pytest.raises(AssertionError, match="CUDA error 1"):
            args = ops._args(f"BnReluMaxpool{struct}", pooling=ops._pooling(c, *window))
            ops._launch(f"bn_relu_maxpool_{op}", args)
