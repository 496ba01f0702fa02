"""The comparisons measure what they say: statistics, the correctness gate, and a run of the suite itself."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import cpu_convolutions
import cpu_ops
import cuda_graph_stand_in
import pytest
import torch
import workloads
from layers import Conv
from torch import nn
from workloads import BASELINE, COMPILED_RECIPES, GRAPHED, CorrectnessGate, Step, Workload, build, recipe_of

from fusedres.measuring import timing
from fusedres.measuring.timing import bootstrap_interval, comparison, interleave
from fusedres.ops.cases import SMALL, cases
from fusedres.ops.contract import BnStats, Conv1x1Forward, ConvBackwardInput, ConvBackwardWeight
from fusedres.ops.dispatch import LOADERS

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
BLOCK = Workload("bottleneck_projection_4", "train", 1, torch.float32, CPU)


def test_resnext_is_the_published_network():
    """25,028,904 parameters, as torchvision's `resnext50_32x4d` has."""
    model = workloads.resnext50()
    assert sum(p.numel() for p in model.parameters()) == 25_028_904
    assert {m.groups for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)} == {32}


def test_ratio_is_paired():
    """Noise that both sides of a round share leaves no trace in the ratio."""
    noise = [1.0, 3.0, 10.0, 2.0, 5.0]
    found = comparison([2.0 * n for n in noise], noise)
    assert found["ratio"] == found["ratio_low"] == found["ratio_high"] == 2.0
    assert found["seconds"] == 3.0
    assert found["baseline_seconds"] == 6.0


def test_bootstrap_interval_of_normal_data():
    """The median of n normal values has a standard error of 1.2533/sqrt(n)."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    low, high = bootstrap_interval(values)
    assert low < 0 < high
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 / 20, rel=0.3)
    assert (low, high) == bootstrap_interval(values)


def test_rounds_are_interleaved():
    order = []
    run = partial(interleave, lambda: order.append("b"), lambda: order.append("t"), CPU, 3)
    baseline, target = run()
    assert "".join(order) == "btbt" + "bttbbt"
    assert len(baseline) == len(target) == 3
    order.clear()
    run(before=lambda: order.append("-"))
    assert "".join(order) == "btbt" + "-b-t-t-b-b-t"


def test_times_are_of_their_side(monkeypatch):
    monkeypatch.setattr(timing, "seconds", lambda run, device: run())
    assert interleave(lambda: 2.0, lambda: 1.0, CPU, 3) == ([2.0] * 3, [1.0] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["fusedres_separate", "fusedres_gram"])
def test_gate_passes_what_is_right(implementation, dtype):
    """Half precision too runs as what it is called: a block is given what the one before it makes."""
    block = replace(BLOCK, dtype=dtype)
    step = build(block, implementation)
    CorrectnessGate().check(block, step, implementation)
    assert step.runs_as() == {implementation.removeprefix("fusedres_"): 1}


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(workloads, "GRAPH_DEVICE", "cpu")
    return cuda_graph_stand_in.install(monkeypatch)


@pytest.mark.parametrize(
    ("implementation", "phase"), [*((name, "infer") for name in GRAPHED), ("fusedres_gram_graphed", "train")]
)
def test_gate_passes_what_is_graphed(implementation, phase, cuda):
    workload = replace(BLOCK, phase=phase)
    step = build(workload, implementation, "reference")
    captures = cuda.captures
    assert captures == {"train": 2, "infer": 1}[phase]
    CorrectnessGate().check(workload, step, implementation)
    assert cuda.captures == captures, "it is replayed, with the input's gradient"
    recipe = recipe_of(implementation)
    assert step.runs_as() == ({} if recipe is None else {{"auto": "unfused"}.get(recipe, recipe): 1})


@pytest.mark.parametrize("implementation", COMPILED_RECIPES)
def test_a_patched_model_is_what_is_compiled_into_graphs(implementation, cuda, monkeypatch):
    seen, steps = [], []
    monkeypatch.setattr(torch, "compile", lambda model, **options: seen.append(options) or model)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(1))
    step = build(BLOCK, implementation)
    step.run()
    assert seen == [{"mode": "reduce-overhead"}] and len(steps) == 1
    assert step.runs_as() == {recipe_of(implementation): 1}


@pytest.mark.parametrize("implementation", [*GRAPHED, *COMPILED_RECIPES, "fusedres_gram_graph"])
def test_graphs_need_a_gpu(implementation):
    with pytest.raises(ValueError, match="replays a CUDA graph, found device cpu"):
        build(BLOCK, implementation)


def test_gate_stops_a_wrong_output():
    step = build(BLOCK, "fusedres_separate")
    wrong = Step(step.run, lambda: step.forward() * 1.0001, step.model)
    with pytest.raises(AssertionError, match="exceeds"):
        CorrectnessGate().check(BLOCK, wrong, "planted")


def test_gate_stops_a_lost_gradient():
    step = build(BLOCK, "fusedres_separate")
    step.model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    with pytest.raises(AssertionError, match="unused"):
        CorrectnessGate().check(BLOCK, step, "planted")


def test_all_implementations_start_from_the_same_weights():
    steps = [build(BLOCK, name) for name in ("eager_nchw", BASELINE, "fusedres_separate")]
    first, *others = (dict(step.model.state_dict()) for step in steps)
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match="no implementation"):
        build(BLOCK, "nonsense")
    with pytest.raises(ValueError, match="CUDA graph"):
        build(BLOCK, "fusedres_auto_graph")


def plant(monkeypatch, op, change):
    """A native backend whose results of one op are changed."""
    right = LOADERS["native"]()
    wrong = replace(right, functions={**right.functions, op: lambda record: change(right(record))})
    monkeypatch.setitem(LOADERS, "native", lambda: wrong)


def a_case(name):
    return next(case for case in cases(SMALL[0], torch.float32, CPU) if case.name == name)


@pytest.mark.skipif("native" not in LOADERS, reason="the native library is not built here")
class TestOpsAgainstACopy:
    def test_bytes_and_ratio(self):
        case = a_case("bn_stats")
        found = cpu_ops.measure(case, 3)
        (c,) = case.op
        assert found["bytes"] == 4 * (c.numel() + 2 * c.shape[1])  # reads c, writes mean and var
        assert found["of_copy_low"] <= found["of_copy"] <= found["of_copy_high"]

    def test_a_wrong_kernel_is_not_measured(self, monkeypatch):
        plant(monkeypatch, BnStats, lambda found: (found[0], found[1] * 1.01))
        with pytest.raises(AssertionError, match="bn_stats"):
            cpu_ops.measure(a_case("bn_stats"), 3)


@pytest.mark.skipif("native" not in LOADERS, reason="the native library is not built here")
class TestConvolutionsAgainstTheLibrary:
    POINTWISE = Conv("", 64, 72, (1, 1), (1, 1), 1, 6, 6, 6, 6)
    WINDOW = Conv("", 64, 72, (3, 3), (2, 2), 1, 6, 6, 3, 3)

    @pytest.mark.parametrize(
        ("conv", "ops"),
        [
            (
                POINTWISE,
                [ConvBackwardWeight, ConvBackwardInput, ConvBackwardInput, Conv1x1Forward],
            ),
            (WINDOW, [ConvBackwardWeight, type(None)]),
        ],
    )
    def test_each_is_checked_and_timed(self, conv, ops):
        found = list(cpu_convolutions.contests(conv, 2, torch.float32))
        assert [type(contest.op) for contest in found] == ops
        for contest in found:
            times = cpu_convolutions.measure(contest, 3)
            assert times["ratio_low"] <= times["ratio"] <= times["ratio_high"]

    def test_both_ways_of_inference_compute_the_same(self):
        *_, product = cpu_convolutions.contests(self.POINTWISE, 2, torch.float32)
        torch.testing.assert_close(product.ours().y, product.library())
        *_, folded = cpu_convolutions.contests(self.WINDOW, 2, torch.float32)
        torch.testing.assert_close(folded.ours(), folded.library())

    def test_a_wrong_kernel_is_not_measured(self, monkeypatch):
        plant(monkeypatch, ConvBackwardWeight, lambda dw: dw * 1.01)
        first = next(cpu_convolutions.contests(self.WINDOW, 2, torch.float32))
        with pytest.raises(AssertionError, match="weight gradient"):
            cpu_convolutions.measure(first, 3)


def test_suite_end_to_end(tmp_path):
    saved = tmp_path / "results.json"
    cell = "cifar_resnet20-infer-fusedres_separate"
    options = [
        "--device",
        "cpu",
        "--batch",
        "2",
        "--rounds",
        "3",
        f"--benchmark-json={saved}",
        "--baseline",
        "eager_nchw",
    ]
    command = [sys.executable, "-P", "-m", "pytest", "bench", "-q", "-m", "", "-k", cell, *options]
    # a worker process of pytest says so to its children, in which pytest-benchmark would then measure nothing
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fusedres separate" in done.stdout and "as fast as eager nchw" in done.stdout
    (benchmark,) = json.loads(saved.read_text())["benchmarks"]
    info = benchmark["extra_info"]
    assert benchmark["group"] == info["workload"] == "cifar_resnet20/infer/float32/2"
    assert info["runs_as"] == {"separate": 10}
    assert info["ratio_low"] <= info["ratio"] <= info["ratio_high"]
    assert benchmark["stats"]["rounds"] == info["rounds"] == 3
