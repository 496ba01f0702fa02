"""What `fusedres.patch(model)` alone comes to where no table is: after its first steps, against the committed table.

    python bench/first_steps.py [--steps 30] [--rounds 9] > first_steps.json

The tables are emptied for one of two copies of a model, which then trains, or infers, that many steps; its losses are
held against those of an unpatched copy, by the rule of accuracy, and its largest memory too. Then steps of all three
run in turns. float32, channels_last, batch 16, images of 224.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres import models
from fusedres.blocks import choice, user_table
from fusedres.blocks.machine import device_name, versions
from fusedres.measuring.timing import bootstrap_interval, median, paired_ratios
from fusedres.trials import registry

BATCH, SIZE = 16, 224
NETWORKS = ("resnet50", "resnet18")


def images(seed: int, batch: int = BATCH, size: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator).contiguous(
        memory_format=torch.channels_last
    )


def labels(batch: int = BATCH) -> Tensor:
    return torch.arange(batch) % 10


def step_of(model: nn.Module, training: bool) -> Callable[[Tensor], Tensor]:
    """Forward, and backward with an optimiser's step; gives the loss, or the outputs of inference."""
    optimizer = torch.optim.SGD(model.parameters(), 0.001)  # more, and rounding grows from step to step

    def train(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels(len(x)).to(x.device))
        loss.backward()
        optimizer.step()
        return loss.detach()

    def infer(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    return train if training else infer


def measure(name: str, training: bool, steps: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = models.create(name, num_classes=10).to(memory_format=torch.channels_last).train(training)
    tried, known = (fusedres.patch(copy.deepcopy(plain)) for _ in range(2))
    of_plain, of_tried, of_known = (step_of(m, training) for m in (plain, tried, known))
    untabled = mock.patch.object(choice, "TABLE", {})
    losses: dict[str, list[float]] = {"unpatched": [], "on trial": []}
    settled, began = None, time.perf_counter()
    for i in range(steps):
        x = images(i)
        with untabled:
            tried_loss = of_tried(x)
        if training:
            losses["on trial"].append(float(tried_loss))
            losses["unpatched"].append(float(of_plain(x)))
        on_trial = any((row.code or "").startswith("measuring") for row in fusedres.report(tried).matched)
        settled = None if on_trial else (settled or i + 1)
    print(f"{name}: {steps} steps in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    x = images(steps)
    for step in (of_known, of_plain):
        step(x)
    times: dict[str, list[float]] = {"on trial": [], "table": [], "unpatched": []}
    for turn in range(rounds):
        order = list(times) if turn % 2 == 0 else list(reversed(times))
        for which in order:
            run = {"on trial": of_tried, "table": of_known, "unpatched": of_plain}[which]
            start = time.perf_counter()
            with untabled if which == "on trial" else nullcontext():
                run(x)
            times[which].append(time.perf_counter() - start)
    against = {}
    for which in ("table", "unpatched"):
        ratios = paired_ratios(times[which], times["on trial"])
        low, high = bootstrap_interval(ratios)
        against[which] = {"ratio": median(ratios), "low": low, "high": high}
    return {
        "network": name,
        "phase": "training" if training else "inference",
        "steps": steps,
        "settled_after": settled,
        "rounds": rounds,
        "seconds": {which: median(found) for which, found in times.items()},
        "times_as_fast_as": against,
        "losses": losses,
        "blocks": [
            {"name": r.name, "runs_as": r.runs_as, "ratio": r.trial} for r in fusedres.report(tried).matched
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ[user_table.ENVIRONMENT_VARIABLE] = str(Path(folder) / "table.json")
        os.environ["FUSEDRES_TRIAL"] = "1"
        user_table.write({})
        for name in NETWORKS:
            for training in (True, False):
                registry.forget()
                rows.append(measure(name, training, options.steps, options.rounds))
    where = {
        "machine": device_name(torch.device("cpu")),
        "versions": versions(),
        "batch": BATCH,
        "size": SIZE,
    }
    json.dump({**where, "rows": rows}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
