"""`fusedres demo`: two ResNets trained on real images, unpatched and patched from one seed, and held together.

Each model is trained three times: unpatched on two threads, unpatched on one (the distance that rounding alone
makes), and patched. A table and a picture say how far apart the runs are.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from fusedres.cli.demo import data, training
from fusedres.cli.demo.plot import difference, plot_curves
from fusedres.cli.demo.training import Run
from fusedres.models import cifar_resnet
from fusedres.patching import api

SEED = 0
FLOAT64_STEPS = 20
TIMING_ROUNDS = 15
CASES = (("ResNet-20", 20, "separate"), ("bottleneck ResNet-29", 29, "gram"))


class Outcome(NamedTuple):
    """What one model's runs gave."""

    title: str
    recipe: str
    matched: int
    blocks: int
    fused: int
    runs: list[Run]  # unpatched on 2 threads, unpatched on 1, patched
    float64_distance: float
    time_ratio: float

    def as_dict(self) -> dict[str, object]:
        return {**self._asdict(), "runs": [vars(run) for run in self.runs]}


def fresh_model(depth: int, identity_start: bool = False) -> nn.Module:
    """The model of that depth; with `identity_start` gamma is 0 in each block's last BN."""
    torch.manual_seed(SEED)
    model = cifar_resnet(depth, in_channels=1, zero_init_residual=identity_start)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def float64_distance(depth: int, recipe: str, digits: data.Digits) -> float:
    """How far the losses of patched and unpatched drift apart in float64.

    Blocks start as the identity: otherwise the first steps amplify rounding noise itself tenfold each.
    """
    plain = fresh_model(depth, identity_start=True)
    patched = api.patch(copy.deepcopy(plain), recipe=recipe)
    return training.float64_distance(plain, patched, digits, FLOAT64_STEPS, SEED)


def run_case(
    title: str, depth: int, recipe: str, digits: data.Digits, epochs: int, progress: Progress
) -> Outcome:
    plain = fresh_model(depth)
    patched = api.patch(copy.deepcopy(plain), recipe=recipe, strict=True)
    report = api.report(patched)
    images = next(training.batches(digits, 1, SEED))[0]
    fused = training.fused_blocks(copy.deepcopy(patched).train(), images)
    runs = []
    for label, model, threads in (
        ("unpatched, 2 threads", copy.deepcopy(plain), 2),
        ("unpatched, 1 thread", copy.deepcopy(plain), 1),
        (f"patched ({recipe}), 2 threads", copy.deepcopy(patched), 2),
    ):
        total = epochs * training.steps_per_epoch(digits)
        task = progress.add_task(f"{title}: {label}", total=total)
        with training.threads(threads):
            runs.append(
                training.train(label, model, digits, epochs, SEED, lambda t=task: progress.advance(t))  # type: ignore[misc]
            )
    with training.threads(2):
        distance = float64_distance(depth, recipe, digits)
        ratio = training.time_ratio(plain, patched, digits, TIMING_ROUNDS)
    return Outcome(title, recipe, len(report.matched), len(report.blocks), fused, runs, distance, ratio)


def results_table(outcomes: list[Outcome]) -> Table:
    table = Table(title="Handwritten digits: unpatched against patched, one seed", show_lines=True)
    for name in ("model", "run", "test accuracy", "final loss", "distance of the loss curve"):
        table.add_column(name, justify="right" if name != "run" else "left")
    for outcome in outcomes:
        for run in outcome.runs:
            apart = max(difference(outcome.runs[0], run))
            table.add_row(
                outcome.title if run is outcome.runs[0] else "",
                run.label,
                f"{run.accuracy:.2%}",
                f"{run.losses[-1]:.5f}",
                "(the yardstick)" if run is outcome.runs[0] else f"{apart:.1e}",
            )
    return table


def proof_table(outcomes: list[Outcome]) -> Table:
    table = Table(title="What ran")
    for name in ("model", "recipe", "blocks matched", "blocks that ran fused"):
        table.add_column(name)
    table.add_column(f"largest loss difference over {FLOAT64_STEPS} float64 steps")
    table.add_column("time per step, patched / unpatched")
    for o in outcomes:
        cells = (o.title, o.recipe, f"{o.matched} of {o.blocks}", f"{o.fused} of {o.blocks}")
        table.add_row(*cells, f"{o.float64_distance:.1e}", f"{o.time_ratio:.2f}")
    return table


def run_demo(output: Path, epochs: int) -> list[Outcome]:
    """Trains, prints the tables, and writes curves.png and results.json into `output`."""
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    digits = data.load(SEED)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        outcomes = [run_case(*case, digits, epochs, progress) for case in CASES]
    console.print(results_table(outcomes))
    console.print(proof_table(outcomes))
    plot_curves({o.title: o.runs for o in outcomes}, output / "curves.png")
    (output / "results.json").write_text(json.dumps([o.as_dict() for o in outcomes], indent=2))
    console.print(f"wrote {output / 'curves.png'} and {output / 'results.json'}")
    return outcomes
