"""Patched is not slower than eager channels_last: the lower 95 % bound of the paired ratio, on this machine.

Run by `make bench-check`. BENCH_DTYPE and BENCH_BATCH choose another precision and batch.
"""

import os

import pytest
import torch
from workloads import BASELINE, CorrectnessGate, Workload, build

from fusedres.measuring.timing import comparison, interleave, seconds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = getattr(torch, os.environ.get("BENCH_DTYPE", "float32"))
SECONDS = 40.0  # of one case, so that the interval of short steps is narrow too
ROUNDS = 15, 800  # at least and at most
# architecture: least ratio, images a step on a CPU and on a GPU
LIMITS = {
    "resnet50": (1.0, 8, 256),
    "resnet18": (0.98, 8, 256),
    "cifar_resnet20": (0.98, 64, 1024),
    "bottleneck_identity_2": (0.98, 8, 256),
    "bottleneck_projection_2": (0.98, 8, 256),
    "basic_identity_2": (0.98, 8, 256),
    "basic_projection_2": (0.98, 8, 256),
}

pytestmark = pytest.mark.speed


@pytest.mark.parametrize("phase", ["train", "infer"])
@pytest.mark.parametrize("architecture", LIMITS)
def test_patched_is_not_slower_than_eager(architecture, phase):
    least, on_cpu, on_gpu = LIMITS[architecture]
    batch = int(os.environ.get("BENCH_BATCH", on_gpu if DEVICE.type == "cuda" else on_cpu))
    workload = Workload(architecture, phase, batch, DTYPE, DEVICE)
    patched, baseline = build(workload, "fusedres_auto"), build(workload, BASELINE)
    CorrectnessGate().check(workload, patched, "fusedres_auto")
    rounds = int(SECONDS / 2 / seconds(baseline.run, DEVICE))
    rounds = min(max(rounds, ROUNDS[0]), ROUNDS[1])
    found = comparison(*interleave(baseline.run, patched.run, DEVICE, rounds))
    shown = f"{found['ratio']:.3f} [{found['ratio_low']:.3f} {found['ratio_high']:.3f}]"
    assert found["ratio_low"] >= least, f"{workload.name}: {shown}, runs as {patched.runs_as()}"
