"""Checks of the host build beyond those of every backend: orders of execution, and vectors made by the last block."""

from __future__ import annotations

import torch
from cuda_host_cases import SEEDS
from cuda_host_ops import HostCudaOps
from raw_op_cases import Case, Inputs, bits
from raw_op_harness import pack, tensors
from torch import Tensor

from fusedres.ops.contract import (
    BatchNormVectors,
    BnAddReluBackwardReduce,
    BnBackwardCoefficients,
    BnScaleShift,
    BnStats,
)
from fusedres.ops.reference import REFERENCE

# what these checks call; a build with some ops under a sanitizer has them there, or does not run these checks
ORDER_OPS = ("bn_stats", "bn_scale_shift", "bn_add_relu_backward_reduce", "bn_backward_coefficients")


def vectors_of(inputs: Inputs, c: Tensor) -> tuple[Tensor, Tensor, BatchNormVectors]:
    weight, bias = (1 + 0.1 * inputs.random((c.shape[1],)).float() for _ in range(2))
    return weight, bias, REFERENCE(BnScaleShift(*REFERENCE(BnStats(c)), weight, bias, 1e-5))


def check_order(ops: HostCudaOps, case: Case) -> None:
    """Sums do not depend on the order of threads and blocks, to the bit."""
    results = []
    for seed in SEEDS:
        ops.module.seed(seed)
        inputs = Inputs(case)
        c, dy, shortcut_c = inputs.c(), inputs.dy(), inputs.c()
        _, _, v = vectors_of(inputs, c)
        sums = ops(BnAddReluBackwardReduce(dy, c, v, shortcut_c=shortcut_c, shortcut_mean=v.mean))
        results.append([bits(t) for t in tensors((ops(BnStats(c)), sums))])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def check_folded(ops: HostCudaOps, case: Case) -> None:
    """Vectors of the last block equal those of the separate kernels."""
    inputs = Inputs(case)
    c, dy, shortcut_c = inputs.c(), inputs.dy(), inputs.c()
    weight, bias, v = vectors_of(inputs, c)
    separate = ops(BnScaleShift(*ops(BnStats(c)), weight, bias, 1e-5))
    folded = ops.bn_stats_scale_shift(c, weight, bias, 1e-5)
    rows, keep = c.numel() // c.shape[1], inputs.random(case.shape) > 0
    mask = pack(keep, inputs)
    sum_dz, centered, side = ops(BnAddReluBackwardReduce(dy, c, v, mask, True, shortcut_c, v.mean))
    separate += ops(BnBackwardCoefficients(sum_dz, centered, v, rows, True))
    separate += ops(BnBackwardCoefficients(sum_dz, side, v, rows, True))
    folded += sum(ops.bn_add_relu_backward_reduce_coefficients(dy, c, v, mask, rows, shortcut_c, v), ())
    for one, two in zip(separate, folded, strict=True):
        assert torch.equal(bits(one), bits(two))


def check_shared(ops: HostCudaOps) -> None:
    """Launches of few counters and of many, in one workspace: partial results of one lie where another has counters."""
    ops.module.set_device(600, 1 << 16)  # with so many multiprocessors a wide reduction is split too
    shapes = Case("narrow", (4, 64, 8, 8)), Case("wide", (4, 20000, 8, 8))
    activations = [Inputs(case).c() for case in shapes]
    size = max(ops.module.bn_stats_workspace(ops._shape(c)) for c in activations)
    memory = torch.full((size,), 0xA5, dtype=torch.uint8)
    shared = ops._args("Workspace", data=memory, bytes=size, zero_bytes=0)
    left = []
    for place in (0, 1, 0, 0, 1):
        c = activations[place]
        mean, var = (torch.full((c.shape[1],), float("nan")) for _ in range(2))
        ops._launch("bn_stats", ops._args("BnStats", shape=ops._shape(c), c=c, mean=mean, var=var), shared)
        left.append(shared.zero_bytes)
        assert not memory[: left[-1]].any(), "counters are left behind"
        for one, two in zip((mean, var), ops(BnStats(c)), strict=True):
            assert torch.equal(bits(one), bits(two))
    assert 0 < left[0] < left[1] and left[2:] == [left[0], left[0], left[1]]
    ops.module.set_device(4, 1 << 16)
