"""Two small ResNets trained on real images, unpatched and patched from one seed, and held together.

Each model is trained three times: unpatched on two threads, unpatched on one (the distance that rounding alone
makes), and patched with a forced recipe. Tables say how far apart the runs are; nothing is timed, for at these sizes
the default leaves every block unfused.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import NamedTuple

import torch
from rich.table import Table
from torch import nn

from fusedres.cli.demo import data, training
from fusedres.cli.demo.plot import difference
from fusedres.cli.demo.training import Run
from fusedres.measuring.progress import Progress
from fusedres.models import cifar_resnet
from fusedres.patching import api

SEED = 0
FLOAT64_STEPS = 10
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
        with training.threads(threads):
            runs.append(
                training.train(label, model, digits, epochs, SEED, partial(progress, f"{title}: {label}"))
            )
    with training.threads(2):
        distance = float64_distance(depth, recipe, digits)
    return Outcome(title, recipe, len(report.matched), len(report.blocks), fused, runs, distance)


def curves_table(outcomes: list[Outcome]) -> Table:
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
    for o in outcomes:
        cells = (o.title, o.recipe, f"{o.matched} of {o.blocks}", f"{o.fused} of {o.blocks}")
        table.add_row(*cells, f"{o.float64_distance:.1e}")
    return table


def run(epochs: int, progress: Progress) -> list[Outcome]:
    """Every case."""
    digits = data.load(SEED)
    return [run_case(*case, digits, epochs, progress) for case in CASES]
