"""Kernels that cannot be compiled, loaded or run: said once, set aside, and the next step is right."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import jit
from triton.runtime.errors import OutOfResources, PTXASError

import fusedres
from fusedres.models import Bottleneck
from fusedres.ops import dispatch, selftest, set_aside, triton_reasons
from fusedres.ops import triton as triton_backend
from fusedres.ops.cases import SMALL, cases
from fusedres.ops.contract import BnStats, Conv1x1Forward

ROOT = Path(__file__).parents[2]
CUDA = [torch.device("cuda", i) for i in range(2)]

# by fault: the reason from then on, and what the one warning says it is and how to mend it
LEFT = {
    "no_compiler": ("triton_unusable", "Failed to find C compiler", "install a C compiler"),
    "cache_that_cannot_be_written": ("triton_unusable", "Not a directory", "set TRITON_CACHE_DIR"),
    "full_disk": ("triton_unusable", "No space left on device", "set TRITON_CACHE_DIR"),
    "gpu_without_code": ("triton_unusable", "no kernel image is available", "update the GPU's driver"),
    "older_driver": ("triton_unusable", "unsupported toolchain", "update the GPU's driver"),
    "refusing_assembler": ("set_aside", "`ptxas` failed with error code 3", "please report it"),
    "too_many_resources": ("set_aside", "too many resources requested", "please report it"),
    "little_shared_memory": ("set_aside", "out of resource: shared memory", "please report it"),
}
RAISED = {"illegal_access": "an illegal memory access", "out_of_memory": "out of memory"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What the calls came to, by fault."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build the stand-in with")
    script = ROOT / "tests" / "support" / "gpu_stand_in_faults.py"
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path_factory.mktemp("faults"))]
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "bench")))
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"fault"')]
    assert {line["fault"] for line in lines} == {*LEFT, *RAISED}, done.stderr
    return {line["fault"]: line for line in lines}


@pytest.mark.parametrize("fault", LEFT)
def test_a_fault_of_the_installation_leaves_the_call_to_the_next_backend(fault, outcomes):
    found = outcomes[fault]
    reason, *said = LEFT[fault]
    assert found["raised"] is None and found["same"] == [True, True]
    assert found["reason"] == reason and len(found["set_aside"]) == (reason == "set_aside")
    (warning,) = found["warned"]
    assert all(part in warning for part in said)


@pytest.mark.parametrize("fault", RAISED)
def test_an_error_of_the_gpu_is_raised_with_the_name_of_the_op(fault, outcomes):
    found = outcomes[fault]
    said, *notes = found["raised"]
    assert RAISED[fault] in said
    assert found["reason"] is None and not found["set_aside"] and not found["warned"]
    if sys.version_info >= (3, 11):
        assert "triton ran bn_stats on" in notes[0] and "please report it" in notes[0]


@pytest.fixture
def served_on_the_cpu(monkeypatch):
    """Triton is said to serve CPU tensors; nothing is left set aside."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    set_aside.forget()
    loaders = dispatch.LOADERS | {"triton": partial(triton_backend.backend, lambda tensor: None)}
    monkeypatch.setattr(dispatch, "LOADERS", loaders)
    monkeypatch.setattr(dispatch, "AUTO_LOADERS", {})
    dispatch._dispatcher.cache_clear()
    yield
    set_aside.forget()
    dispatch._dispatcher.cache_clear()


def failing(error):
    def run(*args, **kwargs):
        raise error

    return run


@pytest.mark.parametrize(
    "error", [PTXASError("bad"), OutOfResources(3, 2, "shared memory"), OSError(30, "Read-only file system")]
)
@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_the_next_step_of_training_is_right(error, recipe, served_on_the_cpu, monkeypatch):
    """As the reference's, bit by bit, in the step that fails and in the one after it; each op is named once."""
    monkeypatch.setattr(jit.JITFunction, "run", failing(error))
    block = Bottleneck(64, 16).to(memory_format=torch.channels_last)
    images = torch.randn(4, 64, 4, 4).contiguous(memory_format=torch.channels_last)
    results = {}
    for backend in ("reference", "triton"):
        model = fusedres.patch(copy.deepcopy(block), recipe=recipe, backend=backend)
        with pytest.warns(RuntimeWarning, match="set aside") if backend == "triton" else nullcontext():
            first = stepped(model, images)
        results[backend] = first, stepped(model, images)
    for expected, found in zip(results["reference"], results["triton"], strict=True):
        assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))
    assert len(set_aside.found()) > 4


def stepped(model, images):
    """Output, gradients and buffers of a step."""
    model.zero_grad()
    y = model(images)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("error", [TypeError("a bug"), ValueError("a bug"), KeyError("a bug")])
def test_a_bug_is_raised(error, served_on_the_cpu, monkeypatch):
    monkeypatch.setattr(jit.JITFunction, "run", failing(error))
    with pytest.raises(type(error), match="a bug"):
        dispatch.dispatcher("triton")(BnStats(torch.randn(2, 8, 1, 1)))
    assert not set_aside.found()


def test_the_self_test_shows_what_was_set_aside(served_on_the_cpu, monkeypatch):
    """Else the reference, which goes on in its place, would pass for it."""
    monkeypatch.setattr(jit.JITFunction, "run", failing(PTXASError("bad")))
    case = next(c for c in cases(SMALL[0], torch.float32, torch.device("cpu")) if c.name == "bn_stats")
    with pytest.warns(RuntimeWarning, match="set aside"):
        outcome = selftest.outcome(dispatch.LOADERS["triton"](), torch.device("cpu"), torch.float32, case)
    assert "PTXAS error: bad" in outcome.problem


def test_each_gpu_is_judged_by_itself(monkeypatch):
    """Of two, one whose probe writes nothing."""
    monkeypatch.setattr(triton_reasons, "_usable", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    probed = []

    def probe(device):
        probed.append(device)
        return "triton_unusable" if device.index else None

    monkeypatch.setattr(triton_reasons, "probed", probe)
    assert [triton_reasons.unusable(d) for d in CUDA * 2] == [None, "triton_unusable"] * 2
    assert probed == CUDA
    with pytest.warns(RuntimeWarning, match="bn_stats on cuda:1"):
        set_aside.note(set_aside.Place("triton", BnStats, CUDA[1]), PTXASError("bad"))
    assert [set_aside.is_aside("triton", BnStats, d) for d in CUDA] == [False, True]
    set_aside.forget()


def test_nothing_is_probed_inside_a_capture(monkeypatch):
    monkeypatch.setattr(triton_reasons, "_usable", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(triton_reasons, "probed", failing(AssertionError("probed")))
    assert triton_reasons.unusable(CUDA[0]) == "not_warm" and not triton_reasons._usable


def test_products_that_nobody_measured_are_the_library_s(monkeypatch):
    class OnCuda:
        """What the reason asks of a tensor."""

        is_cuda, device = True, CUDA[0]

    x = OnCuda()
    monkeypatch.setattr(triton_reasons, "device_name", lambda device: "some GPU")
    plain = Conv1x1Forward(x, x)
    serves = partial(
        triton_reasons.reason, device_reason=lambda tensor: None, measured=triton_reasons.is_measured_product
    )
    assert serves(plain) == "product_not_measured"
    assert triton_reasons.is_measured_product(plain._replace(in_scale=x, in_shift=x))
    monkeypatch.setattr(triton_reasons, "MEASURED_PRODUCTS", {"some GPU"})
    assert triton_reasons.is_measured_product(plain)
