"""From which size on a fused block pays: blocks of each kind and stage at rising batches, against eager channels_last.

    python bench/block_sizes.py {train,infer} [RECIPE] [--seconds 2] [--dtype float32] > block_sizes_train.json

What the sizes in `fusedres/blocks/choice.py` are set from. The CPU or the first GPU; half precision is autocast.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(Path(__file__).parent), str(TESTS / "support"), str(TESTS / "zoo")]

from workloads import ARCHITECTURES, BASELINE, Workload, build  # noqa: E402

from fusedres.measuring.timing import comparison, interleave, seconds  # noqa: E402

KINDS = ("basic_identity", "basic_projection", "bottleneck_identity", "bottleneck_projection")
BATCHES = {1: (1, 2, 4, 8), 2: (1, 4, 8, 16), 3: (1, 4, 16), 4: (2, 8, 16)}  # stage: images


def measure(workload: Workload, implementation: str, budget: float) -> dict[str, object]:
    """One block against the baseline, in turns for about `budget` seconds."""
    baseline, target = build(workload, BASELINE), build(workload, implementation)
    for _ in range(2):
        baseline.run()
    rounds = max(7, min(100, int(budget / 2 / seconds(baseline.run, workload.device))))
    shape = (workload.batch, *ARCHITECTURES[workload.architecture].image)
    found = comparison(*interleave(baseline.run, target.run, workload.device, rounds))
    return {"workload": workload.name, "elements": math.prod(shape), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=("train", "infer"))
    parser.add_argument("recipe", nargs="?", default="separate")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each block and batch")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    cells = []
    for kind in KINDS:
        for stage, batches in BATCHES.items():
            for batch in batches:
                workload = Workload(f"{kind}_{stage}", options.phase, batch, dtype, device)
                cells.append(measure(workload, f"fusedres_{options.recipe}", options.seconds))
                print(f"{cells[-1]['workload']}: {cells[-1]['ratio']:.2f}", file=sys.stderr)
    threads = torch.get_num_threads()
    print(json.dumps({"torch": torch.__version__, "threads": threads, "cells": cells}, indent=1))


if __name__ == "__main__":
    main()
