"""Runs the checks of some ops on a host build, in a process of its own: for sanitizers and for planted bugs.

    python cuda_host_run.py MODULE OP...    exit 0, or the first failure: an assertion, a sanitizer's report

Shapes are small, yet have several blocks to merge, both ways to load, a ragged end, and an unaligned start.
"""

import sys
from pathlib import Path

import torch
from cuda_host_build import load
from cuda_host_ops import HostCudaOps
from raw_op_cases import FORMS, Case, Inputs, bits
from raw_op_checks import CHECKS
from raw_op_harness import tensors

CASES = (
    Case("groups", (2, 256, 5, 9)),
    Case("groups_C129", (1, 129, 5, 9)),
    Case("ragged", (2, 17, 3, 5)),
    Case("offset", (1, 24, 3, 5), "offset"),
    Case("nan_inf", (2, 24, 5, 7), special=True),
)
SEEDS = (1, 2, 3)


def check_order(ops: HostCudaOps, op: str) -> None:
    """Statistics do not depend on the order in which blocks run, to the bit."""
    if op != "bn_stats":
        return
    c = Inputs(CASES[0]).c()
    results = []
    for seed in SEEDS:
        ops.module.seed(seed)
        results.append(tensors(ops.bn_stats(c)))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(bits(one), bits(two)), f"{op}: the result depends on the order of blocks"


def check_huge(ops: HostCudaOps, op: str) -> None:
    """Beyond 2^31 elements: only the two blocks at the ends of the tensor run, so few of its pages exist."""
    if op != "relu_backward":
        return
    numel = 2**31 + 24
    dy, dz = (torch.empty(numel, dtype=torch.bfloat16) for _ in range(2))
    mask = torch.empty(-(-numel // 8), dtype=torch.uint8)
    ends = (slice(0, 16), slice(numel - 16, numel))
    for end in ends:
        dy[end] = torch.arange(1, 17)
    mask[:2] = mask[-2:] = 0b01010101
    ops.module.set_device(1 << 20, 1 << 16)
    ops.module.run_only_blocks([0, -(-numel // (8 * 256)) - 1])
    fields = {"dtype": ops.module.Dtype.bfloat16, "numel": numel, "dy": dy, "mask": mask, "dz": dz}
    assert ops.module.relu_backward(ops._args("ReluBackward", **fields)) == 0
    for end in ends:
        assert torch.equal(dz[end], torch.arange(1, 17) * torch.tensor([1, 0] * 8)), (
            "wrong beyond 2^31 elements"
        )


def main(module: str, *names: str) -> None:
    torch.set_num_threads(1)
    ops = HostCudaOps(load(Path(module)))
    for op in names:
        ops.module.set_device(4, 1 << 16)
        ops.module.run_only_blocks([])
        for seed, case in zip(SEEDS * 2, CASES, strict=False):
            ops.module.seed(seed)
            if "C129" not in case.id or "reduce" in op or op == "bn_stats":
                CHECKS[op](ops, Case(**{**vars(case), "form": FORMS[op][0], "dtype": torch.bfloat16}))
        check_order(ops, op)
        check_huge(ops, op)
    print("passed:", *names)


if __name__ == "__main__":
    main(*sys.argv[1:])
