"""Throughput of blocks and models, each implementation interleaved with a baseline: eager channels_last, or another.

    pytest bench -m "" [--device cuda] [--dtype bfloat16] [--batch 32] [--baseline NAME] [-k "resnet50 and train"]

The baseline is timed in `setup`, so every round of an implementation has a baseline round beside it in the
same process: noise that lasts longer than a round cancels in the ratio. The baseline against itself is a cell
too: its interval is the noise that is left.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from workloads import (
    BASELINE,
    FUSEDRES,
    IMPLEMENTATIONS,
    CorrectnessGate,
    Workload,
    build,
    needs_graph,
)

from fusedres.measuring.timing import comparison, seconds

NETWORKS = "resnet50", "resnext50", "resnet18", "resnet34", "cifar_resnet20"
ARCHITECTURES = (
    *NETWORKS,
    "bottleneck_identity_2",
    "bottleneck_projection_2",
    "basic_identity_2",
    "basic_projection_2",
)
# images a step on a CPU and on a GPU
BATCHES = {**dict.fromkeys(NETWORKS, (8, 256)), "cifar_resnet20": (64, 1024)}
BLOCK_BATCHES = (8, 256)
ON_CPU = ("eager_nchw", BASELINE, "torch_compile", *FUSEDRES)
HEADLINE = {
    ("resnet50", "train"): ("eager_nchw", "torch_compile", *FUSEDRES),
    ("resnet50", "infer"): FUSEDRES[:2],
    ("resnet18", "train"): FUSEDRES[:2],
    ("cifar_resnet20", "train"): FUSEDRES[:2],
    ("bottleneck_identity_2", "train"): (BASELINE, *FUSEDRES),
    ("bottleneck_projection_2", "train"): FUSEDRES,
    ("basic_identity_2", "train"): FUSEDRES[:2],
    ("basic_projection_2", "train"): FUSEDRES[:2],
}


def has_form(architecture: str, implementation: str) -> bool:
    """Whether the recipe is one of this form of block: `gram` of bottlenecks, `prologue` of others."""
    is_bottleneck = architecture in ("resnet50", "resnext50") or "bottleneck" in architecture
    return ("prologue" if is_bottleneck else "gram") not in implementation


def pytest_generate_tests(metafunc):
    offered = IMPLEMENTATIONS if metafunc.config.getoption("--device") == "cuda" else ON_CPU
    cells = []
    for architecture, phase, name in product(ARCHITECTURES, ("train", "infer"), offered):
        if has_form(architecture, name):
            headline = name in HEADLINE.get((architecture, phase), ())
            marks = [pytest.mark.headline] if headline else []
            label = f"{architecture}-{phase}-{name}"
            cells.append(pytest.param(architecture, phase, name, marks=marks, id=label))
    metafunc.parametrize(("architecture", "phase", "implementation"), cells)


@pytest.fixture(scope="session")
def gate() -> CorrectnessGate:
    return CorrectnessGate()


@pytest.fixture
def workload(request, architecture, phase) -> Workload:
    device = torch.device(request.config.getoption("--device"))
    by_device = BATCHES.get(architecture, BLOCK_BATCHES)[device.type == "cuda"]
    batch = request.config.getoption("--batch") or by_device
    return Workload(architecture, phase, batch, getattr(torch, request.config.getoption("--dtype")), device)


def test_throughput(request, benchmark, gate, results, workload, implementation):
    rounds = request.config.getoption("--rounds")
    step = build(workload, implementation, request.config.getoption("--backend"))
    gate.check(workload, step, implementation)
    against = request.config.getoption("--baseline")
    baseline = build(workload, against)
    times: dict[str, list[float]] = {"baseline": [], "target": []}

    def time_baseline() -> None:
        times["baseline"].append(seconds(baseline.run, workload.device))

    def time_target() -> None:
        times["target"].append(seconds(step.run, workload.device))

    benchmark.group = workload.name
    benchmark.pedantic(time_target, setup=time_baseline, iterations=1, rounds=rounds, warmup_rounds=1)
    found = comparison(times["baseline"][-rounds:], times["target"][-rounds:])
    names = {"workload": workload.name, "implementation": implementation, "baseline": against}
    benchmark.extra_info.update(**names, **found, runs_as=step.runs_as(), graph=needs_graph(implementation))
    results.append({**names, **found})
