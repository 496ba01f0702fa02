"""warmup compiles a step's Triton kernels before it launches any: what is planned, and what that leaves behind."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from block_forms import bottleneck
from torch import nn
from trials_on import trials_on

pytest.importorskip("triton")

from triton.runtime import jit

import fusedres
from fusedres.measuring import compile_ahead, ranks
from fusedres.modules.derived_class import STATE
from fusedres.ops import dispatch, set_aside
from fusedres.ops import triton as triton_backend
from fusedres.patching.api import patched_blocks
from fusedres.recording import replays
from fusedres.trials import proof
from fusedres.trials.on_block import OnBlock
from fusedres.triton_kernels import launch


class Runs(list):
    """Of each kernel that was to run: its name, its constants, and whether it was compiled without being launched."""

    def run(self, kernel, *args, grid, warmup, **options):
        self.append((kernel.__name__, tuple(t is None for t in args), tuple(options.items()), warmup))

    def of(self, warmup):
        return {found[:-1] for found in self if found[-1] is warmup}


@pytest.fixture
def runs(monkeypatch):
    """Triton is said to serve CPU tensors, as those of a GPU; kernels are noted and neither compiled nor launched."""
    found = Runs()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(compile_ahead, "DEVICES", {"cpu"})
    loaders = dispatch.LOADERS | {"triton": partial(triton_backend.backend, lambda tensor: None)}
    monkeypatch.setattr(dispatch, "LOADERS", loaders)
    monkeypatch.setattr(dispatch, "AUTO_LOADERS", {})
    monkeypatch.setattr(
        jit.JITFunction, "run", lambda kernel, *args, **options: found.run(kernel, *args, **options)
    )
    set_aside.forget()
    dispatch._dispatcher.cache_clear()
    yield found
    set_aside.forget()
    dispatch._dispatcher.cache_clear()


def model_of(recipe, backend="triton"):
    torch.manual_seed(0)
    return fusedres.patch(nn.Sequential(bottleneck()()), recipe=recipe, backend=backend)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 32, 4, 4).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_all_that_a_step_launches_is_compiled_before_its_first_launch(recipe, runs, x):
    fusedres.warmup(model_of(recipe), x)
    launched = runs.of(warmup=False)
    assert len(launched) > 8 and launched <= runs.of(warmup=True)
    order = [warmup for *_, warmup in runs]
    assert order == sorted(order, reverse=True), "a kernel was launched while others were not compiled yet"


def test_hooks_see_right_values_while_nothing_is_launched(runs, x):
    seen = {}
    for backend in ("reference", "triton"):
        model, found = model_of("gram", backend), []
        seen[backend] = found
        model.register_forward_hook(lambda _m, _x, y, found=found: found.append(y))
        fusedres.warmup(model, x)
    assert len(seen["reference"]) == 2 and len(seen["triton"]) == 4
    assert all(torch.equal(r, t) for r, t in zip(seen["reference"], seen["triton"][:2], strict=True))


def test_a_plan_leaves_no_trace(runs, x, monkeypatch):
    """Nothing is recorded of it, and a graph's capture may not take a call for warm whose kernels were not loaded."""
    monkeypatch.setattr(replays, "DEVICES", {"cpu"})
    monkeypatch.setattr("fusedres.patching.warm.on_gpu", lambda x: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    replays.forget()
    model, left = model_of("separate"), []
    step_of = compile_ahead.compile_step

    def looked_at(model, *args):
        step_of(model, *args)
        (block,) = [vars(block)[STATE] for _, block in patched_blocks(model)]
        left.append((replays.known(), set(block.warm), block.on_trial.planned, torch.is_grad_enabled()))

    monkeypatch.setattr("fusedres.measuring.warmup.compile_step", looked_at)
    fusedres.warmup(model, x)
    assert left == [({}, set(), None, True)] and runs.of(warmup=True)
    replays.forget()


def test_without_gradients_only_the_forward_is_compiled(runs, x):
    with torch.no_grad():
        fusedres.warmup(model_of("separate"), x)
    assert runs and not any("backward" in name for name, *_ in runs)


def test_recipes_on_trial_are_all_planned_and_none_is_proved_or_timed(runs, x, tmp_path):
    def refused(*args):
        raise AssertionError("proved")

    with trials_on(tmp_path) as patching:
        patching.setattr(proof, "prove", refused)
        patching.setattr("fusedres.measuring.warmup.settle", refused)
        model = model_of("auto")
        with pytest.raises(AssertionError, match="proved"):  # by the step that is to run, after the plan
            fusedres.warmup(model, x)
        assert fusedres.measuring.warmup.timed_so_far(model) == 0
    names = {name for name, *_ in runs.of(warmup=True)}
    assert {"gram_kernel", "conv1x1_gram_backward_input_kernel", "bn_stats_kernel"} <= names
    assert not runs.of(warmup=False)


def test_kernels_of_another_backend_are_not_run_without_a_proof(runs, monkeypatch):
    """Of the recipes on trial: only Triton's launches are left out of a plan."""
    native = SimpleNamespace(name="native", is_plain=False)
    own, other = dispatch.dispatcher("triton"), SimpleNamespace(backends=(native, dispatch.REFERENCE))
    call, kind = SimpleNamespace(config=None, tensors=()), SimpleNamespace(candidates=("gram",))
    monkeypatch.setattr(proof, "is_known", lambda *args: False)
    assert OnBlock.runs_nothing_unproved(kind, call, own)
    assert not OnBlock.runs_nothing_unproved(kind, call, other)
    monkeypatch.setattr(proof, "is_known", lambda *args: True)
    assert OnBlock.runs_nothing_unproved(kind, call, other)


def test_no_memory_for_the_plan_leaves_the_rest_to_the_step(runs, x, caplog):
    failed = []

    def fail_once(*args):
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("out of memory")

    model = model_of("separate")
    model.register_forward_hook(fail_once)
    with caplog.at_level("INFO", "fusedres"):
        fusedres.warmup(model, x)
    assert runs.of(warmup=False) and "no memory to plan" in caplog.text


def test_what_the_step_raises_is_raised_and_nothing_stays_planned(runs, x):
    model = model_of("separate")
    model.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fusedres.warmup(model, x)
    assert launch.is_launching() and not runs.of(warmup=False)


def test_compare_plans_both_phases_before_its_first_step(runs, x, monkeypatch):
    def stop(*args):
        raise InterruptedError

    monkeypatch.setattr("fusedres.measuring.compare.settle", stop)
    monkeypatch.setattr(ranks, "together", stop)  # others in a process group need not compare
    model = fusedres.unpatch(model_of("separate"))
    with pytest.raises(InterruptedError):
        fusedres.compare(model, x, recipe="separate", backend="triton", rounds=2)
    order = [warmup for *_, warmup in runs]
    assert order == sorted(order, reverse=True)
    planned = runs.of(warmup=True)
    assert any("backward" in name for name, *_ in planned)
    assert runs.of(warmup=False) <= planned


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_on_a_cpu_nothing_is_planned(backend, x, monkeypatch):
    """Neither for its tensors, nor where no backend of the model is Triton's."""
    if backend == "reference":
        monkeypatch.setattr(compile_ahead, "DEVICES", {"cpu"})
    monkeypatch.setattr(compile_ahead, "planning", lambda *args: 1 / 0)
    monkeypatch.setattr(jit.JITFunction, "run", lambda *args, **options: 1 / 0)
    calls = []
    model = model_of("separate", backend)
    model.register_forward_hook(lambda *args: calls.append(1))
    fusedres.warmup(model, x, progress=lambda *told: calls.append(told))
    assert calls == [1, 1]
