"""Host time of a ResNet-50's training step on the stand-in GPU, in eager's: prints the ratios of each recipe as JSON.

Run as a script, in a process of its own: the stand-in changes it for good.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

ROUNDS = 100


def measure(recipes: list[str]) -> dict[str, list[float]]:
    import gpu_stand_in
    from gpu_stand_in import steps

    torch.set_num_threads(1)
    cases = steps.Case(steps.EAGER), *map(steps.Case, recipes)
    rows = steps.measured(gpu_stand_in.install(), steps.network("resnet50"), cases, ROUNDS)
    return {case.name: row.ratios for case, row in rows.items()}


if __name__ == "__main__":
    root = Path(__file__).parents[2]
    sys.path[:0] = [str(root), str(root / "bench")]
    print(json.dumps(measure(sys.argv[1:])))
