"""The CUDA kernels on the CPU, by the checks that every backend has to pass."""

from dataclasses import replace

import cuda_host_build
import pytest
import torch
from cuda_host_ops import HostCudaOps
from raw_op_cases import Case, Inputs, bits, cases_of
from raw_op_checks import CHECKS
from raw_op_harness import pack, tensors

from fusedres.backends.reference import ReferenceOps, pack_mask

pytestmark = pytest.mark.skipif(cuda_host_build.cuda_include() is None, reason="no CUDA headers here")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEEDS = (1, 2, 3)
# several blocks for the last one to merge, with packets and with single channels
GROUPS = (Case("groups", (2, 256, 5, 9)), Case("groups_C129", (2, 129, 5, 9)), Case("rows", (3, 8, 20, 30)))
LIBRARY = ("conv_bias_add_relu_forward", "conv_backward_input", "conv_backward_weight")
OPS = [op for op in CHECKS if op not in LIBRARY]
CASES = [
    pytest.param(op, case, id=f"{op}-{case}")
    for op in OPS
    for case in (
        *cases_of(op),
        *(replace(c, form=f) for c in GROUPS for f in {x.form: 0 for x in cases_of(op)}),
    )
    if case.layout in ("channels_last", "offset")  # the binding makes others dense
]


@pytest.fixture(scope="module")
def ops():
    made = HostCudaOps(cuda_host_build.load(cuda_host_build.build("plain")))
    made.module.set_device(4, 1 << 16)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), CASES)
@pytest.mark.filterwarnings("ignore:var_mean")
def test_op(ops, op, case, dtype):
    ops.module.seed(1)
    CHECKS[op](ops, replace(case, dtype=DTYPES[dtype]))


def vectors_of(inputs, c):
    weight, bias = (1 + 0.1 * inputs.random((c.shape[1],)).float() for _ in range(2))
    return weight, bias, ReferenceOps().bn_scale_shift(*ReferenceOps().bn_stats(c), weight, bias, 1e-5)


@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_results_do_not_depend_on_the_order_of_threads_and_blocks(ops, case):
    results = []
    for seed in SEEDS:
        ops.module.seed(seed)
        inputs = Inputs(case)
        c, dy, shortcut_c = inputs.c(), inputs.dy(), inputs.c()
        _, _, v = vectors_of(inputs, c)
        sums = ops.bn_add_relu_backward_reduce(dy, c, v, shortcut_c=shortcut_c, shortcut_mean=v.mean)
        results.append([bits(t) for t in tensors((ops.bn_stats(c), sums))])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("case", (*GROUPS, Case("C17", (2, 17, 3, 5))), ids=str)
def test_vectors_of_the_last_block_equal_those_of_the_separate_kernels(ops, case):
    inputs = Inputs(case)
    c, dy, shortcut_c = inputs.c(), inputs.dy(), inputs.c()
    weight, bias, v = vectors_of(inputs, c)
    separate = ops.bn_scale_shift(*ops.bn_stats(c), weight, bias, 1e-5)
    folded = ops.bn_stats_scale_shift(c, weight, bias, 1e-5)
    rows, keep = c.numel() // c.shape[1], inputs.random(case.shape) > 0
    mask = pack(keep, inputs)
    sum_dz, centered, side = ops.bn_add_relu_backward_reduce(dy, c, v, mask, True, shortcut_c, v.mean)
    separate += ops.bn_backward_coefficients(sum_dz, centered, v, rows, True)
    separate += ops.bn_backward_coefficients(sum_dz, side, v, rows, True)
    folded += sum(ops.bn_add_relu_backward_reduce_coefficients(dy, c, v, mask, rows, shortcut_c, v), ())
    for one, two in zip(separate, folded, strict=True):
        assert torch.equal(bits(one), bits(two))


@pytest.mark.parametrize("channels", (1, 3, 17, 24))
def test_mask_bits_past_the_last_element_are_zero(ops, channels):
    inputs = Inputs(Case("tail", (1, channels, 3, 7)))
    c = inputs.c()
    y, mask = ops.bn_add_relu_forward(c, torch.ones(channels), torch.ones(channels), save_mask=True)
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
        workspace = ops._args("Workspace", data=memory, bytes=short, counters_are_zero=True)
        assert ops.module.bn_stats(args, workspace) == cuda_error_invalid_value


@pytest.mark.parametrize("window", [(16, 2, 1), (3, 2, 2), (3, 0, 1), (9, 1, 0), (3, 1, -1)], ids=str)
def test_a_window_that_no_kernel_takes_is_an_error(ops, window):
    c = Inputs(GROUPS[0]).c()  # 5 x 9
    for op, struct in (("forward", "Forward"), ("backward_input", "BackwardInput")):
        with pytest.raises(AssertionError, match="CUDA error 1"):
            args = ops._args(f"BnReluMaxpool{struct}", pooling=ops._pooling(c, *window))
            ops._launch(f"bn_relu_maxpool_{op}", args)
