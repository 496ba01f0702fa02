"""Runs the checks of some ops on a host build, in a process of its own: for sanitizers and for planted bugs.

    python cuda_host_run.py MODULE VARIANT [--every-order] [--some-shapes] OP...

Exit 0, or the first failure: an assertion, a sanitizer's report. Every case of `cuda_host_cases`; of some shapes where
asked for, and under ThreadSanitizer, which takes ten times as long. Each dtype sees another order of threads and
blocks, or all three.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from cuda_host_build import load
from cuda_host_cases import GROUPS, SEEDS, dtypes_of, host_cases, runs_under_thread_sanitizer
from cuda_host_checks import ORDER_OPS, check_folded, check_order, check_shared
from cuda_host_list_checks import LIST_CHECKS
from cuda_host_ops import HostCudaOps
from every_raw_op import CHECKS

EVERY_ORDER, SOME_SHAPES = "--every-order", "--some-shapes"


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
    print("beyond 2^31 elements", flush=True)  # whatever happens then, a crash too, is of this check
    ops.module.set_device(1 << 20, 1 << 16)
    ops.module.run_only_blocks([0, -(-numel // (8 * 256)) - 1])
    fields = {"dtype": ops.module.Dtype.bfloat16, "numel": numel, "dy": dy, "mask": mask, "dz": dz}
    assert ops.module.relu_backward(ops._args("ReluBackward", **fields)) == 0
    for end in ends:
        assert torch.equal(dz[end], torch.arange(1, 17) * torch.tensor([1, 0] * 8)), "wrong values there"


def main(module: str, variant: str, *names: str) -> None:
    every_order, some_shapes = EVERY_ORDER in names, SOME_SHAPES in names or variant == "thread"
    names = tuple(name for name in names if name not in (EVERY_ORDER, SOME_SHAPES))
    torch.set_num_threads(1)
    ops = HostCudaOps(load(Path(module)))
    for op in names:
        ops.module.set_device(4, 1 << 16)
        ops.module.run_only_blocks([])
        for seed in SEEDS if op in LIST_CHECKS else ():
            ops.module.seed(seed)
            LIST_CHECKS[op](ops, variant)
        for case in host_cases(op) if op in CHECKS else ():
            if some_shapes and not runs_under_thread_sanitizer(op, case):
                continue
            for dtype, seed in zip(dtypes_of(op, case), SEEDS, strict=False):
                for order in SEEDS if every_order else (seed,):
                    ops.module.seed(order)
                    CHECKS[op](ops, replace(case, dtype=dtype))
        if op == "bn_stats" and (variant == "plain" or set(ORDER_OPS) <= set(names)):
            for case in GROUPS:
                check_order(ops, case)
                check_folded(ops, case)
            check_shared(ops)
        check_huge(ops, op)
    print("passed:", ops.module.kernels_launched(), "kernels of", *names)


if __name__ == "__main__":
    main(*sys.argv[1:])
