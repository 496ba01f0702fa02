"""Every memory-bound raw op of the native CPU kernels against a copy of as many bytes, at ResNet-50's shapes.

    python bench/cpu_ops.py [--batch 16] [--dtype float32] [--rounds 15] > bench/results/cpu/ops_float32.json

Op and copy take turns, each after the caches were filled with something else. `of_copy` is the op's bytes a second over
the copy's: a copy reads and writes equally much, an op that mostly reads can pass 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial

import torch
from op_cases import checked_bytes, resnet_shape

from fusedres.measuring.timing import comparison, interleave
from fusedres.ops.cases import OpCase, cases
from fusedres.ops.contract import op_name
from fusedres.ops.dispatch import LOADERS

CPU = torch.device("cpu")
FLUSH_BYTES = 128 << 20  # several times the last cache of a desktop's or a shared server's core complex
BOUND_BY_ARITHMETIC = ("conv", "gram")  # they are measured as parts of blocks
ON_VECTORS = ("bn_scale_shift", "bn_backward_coefficients")  # of channels: nothing to move


def copy_of(bytes_moved: int) -> Callable[[], object]:
    """A copy that reads half of the bytes and writes half."""
    source = torch.ones(bytes_moved // 8)
    return partial(torch.empty_like(source).copy_, source)


def measure(case: OpCase, rounds: int) -> dict[str, object]:
    """The op against the copy. Raises AssertionError if its results are wrong."""
    run = partial(LOADERS["native"](), case.op)
    moved = checked_bytes(case.op, run())
    copy, flush = copy_of(moved), torch.empty(FLUSH_BYTES, dtype=torch.int8)
    times = comparison(*interleave(copy, run, CPU, rounds, before=flush.zero_))
    return {
        "bytes": moved,
        "seconds": times["seconds"],
        "gigabytes_per_second": moved / float(times["seconds"]) / 1e9,  # type: ignore[arg-type]
        "copy_gigabytes_per_second": moved / float(times["baseline_seconds"]) / 1e9,  # type: ignore[arg-type]
        "of_copy": times["ratio"],
        "of_copy_low": times["ratio_low"],
        "of_copy_high": times["ratio_high"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3, 4), nargs="*", default=(1, 2, 3, 4))
    options = parser.parse_args()
    native = LOADERS["native"]()
    found = {}
    for stage in options.stage:
        for case in cases(resnet_shape(stage, options.batch), getattr(torch, options.dtype), CPU):
            op = op_name(type(case.op))
            other = op in ON_VECTORS or any(word in op for word in BOUND_BY_ARITHMETIC)
            if other or native.reason(case.op) is not None:
                continue
            cell = measure(case, options.rounds)
            found[f"stage{stage}/{case.name}"] = cell
            print(f"stage{stage}/{case.name}: {cell['of_copy']:.2f} of a copy", file=sys.stderr)
    threads = torch.get_num_threads()
    kept = {"torch": torch.__version__, "threads": threads, "batch": options.batch, "dtype": options.dtype}
    print(json.dumps({**kept, "cells": found}, indent=1))


if __name__ == "__main__":
    main()
