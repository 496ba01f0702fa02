"""How near the outputs of whole patched networks come to the limit of the rule of accuracy, over seeds of weights.

    python bench/model_errors.py [--seeds 5] > model_errors.json

In training mode, where batch statistics carry an error on; float32, channels_last, recipe "separate". The largest share
of the limit is printed at the end: above 1 a network would be refused by `fusedres verify`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import fusedres
from fusedres import models
from fusedres.ops.accuracy import error_limit, relative_error
from fusedres.ops.native import winograd

RUNS: dict[str, dict[str, str]] = {"fast": {}, "strict": {"accuracy": "strict"}, "direct": {}}


class Case(NamedTuple):
    network: str
    batch: int
    size: int


CASES = (
    *(Case("cifar_resnet20", 2, 8), Case("cifar_resnet20", 4, 16), Case("cifar_resnet20", 8, 32)),
    *(Case("cifar_resnet110", 4, 32), Case("resnet18", 4, 64), Case("resnet34", 4, 64)),
    *(Case("resnet50", 4, 64), Case("resnet18", 2, 224)),
)


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def errors(case: Case, seed: int) -> tuple[float, dict[str, float]]:
    """Eager's error, and that of each of RUNS as a share of the limit."""
    torch.manual_seed(seed)
    model = models.create(case.network).to(memory_format=torch.channels_last).train()
    images = torch.randn(case.batch, 3, case.size, case.size).contiguous(memory_format=torch.channels_last)
    exact = outputs(copy.deepcopy(model).double(), images.double())
    own = relative_error(outputs(copy.deepcopy(model), images), exact)
    shares = {}
    for run, options in RUNS.items():
        patched = fusedres.patch(copy.deepcopy(model), recipe="separate", **options)  # type: ignore[arg-type]
        with mock.patch.dict(os.environ, {winograd.ENVIRONMENT_VARIABLE: "0" if run == "direct" else "1"}):
            shares[run] = relative_error(outputs(patched, images), exact) / error_limit(own, torch.float32)
    return own, shares


def measure(case: Case, seeds: int) -> dict[str, Any]:
    found = [errors(case, seed) for seed in range(seeds)]
    shares = {run: [each[run] for _, each in found] for run in RUNS}
    return {
        **case._asdict(),
        "seeds": seeds,
        "eager_error": median([own for own, _ in found]),
        "share_of_limit": {run: {"median": median(s), "largest": max(s)} for run, s in shares.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(measure(case, options.seeds))
        shown = ", ".join(
            f"{run} {share['largest']:.2f}" for run, share in rows[-1]["share_of_limit"].items()
        )
        print(f"{case.network} {case.batch} x {case.size}: of the limit {shown}", file=sys.stderr)
    largest = max(row["share_of_limit"]["fast"]["largest"] for row in rows)
    print(f"largest share of the limit: {largest:.2f}", file=sys.stderr)
    print(
        json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
