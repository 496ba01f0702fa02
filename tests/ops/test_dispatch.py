"""Which backend serves an op: requests by argument, context and environment, and what a refusal says."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fusedres import BackendUnavailableError, use_backend
from fusedres.ops.backend import Backend
from fusedres.ops.contract import RAW_OPS, BnStats, Gram, op_name
from fusedres.ops.dispatch import Dispatcher, backend_names, dispatcher
from fusedres.ops.fake import FAKE
from fusedres.ops.reference import REFERENCE


def only_float32(op):
    return None if op.c.dtype is torch.float32 else "dtype"


PICKY = Backend("picky", {BnStats: lambda op: (op.c.sum(), op.c.sum())}, {BnStats: only_float32})


def test_a_call_goes_to_the_first_backend_that_serves_it():
    ops = Dispatcher((PICKY, REFERENCE))
    c, v = torch.ones(2, 3, 2, 2), torch.ones(3)
    assert ops(BnStats(c))[0] == 24
    assert torch.equal(ops(BnStats(c.double()))[0], torch.ones(3, dtype=torch.float64))
    assert [PICKY.reason(op) for op in (BnStats(c), BnStats(c.double()), Gram(c, v, v))] == [
        None,
        "dtype",
        "no_kernel",
    ]
    assert ops.serving(BnStats(c)) is PICKY and ops.serving(Gram(c, v, v)) is REFERENCE
    assert ops.backend_on(c) == "picky" and ops.backend_on(c.double()) == "reference"


def test_a_backend_is_asked_once_a_call():
    asked = []
    noting = replace(PICKY, reasons={BnStats: asked.append})
    ops, op = Dispatcher((noting, REFERENCE)), BnStats(torch.ones(2, 3, 2, 2))
    ops(op)
    ops.serving(op)(op)
    assert len(asked) == 2


def test_a_call_that_nobody_serves_says_why():
    with pytest.raises(BackendUnavailableError, match=r"no backend serves this bn_stats \(picky: dtype\)"):
        Dispatcher((PICKY,))(BnStats(torch.ones(2, 3, 2, 2).double()))


def test_the_reference_and_the_fake_have_every_raw_op():
    assert set(REFERENCE.functions) == set(FAKE.functions) == set(RAW_OPS.values())
    assert not REFERENCE.reasons and all(RAW_OPS[op_name(op)] is op for op in REFERENCE.functions)


def test_context_and_environment_choose(monkeypatch):
    with use_backend("reference"):
        assert [b.name for b in dispatcher().backends] == ["reference"]
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    assert [b.name for b in dispatcher().backends] == ["reference"]
    monkeypatch.setenv("FUSEDRES_BACKEND", "abacus")
    with pytest.raises(BackendUnavailableError, match="'abacus' is not available, found auto"):
        dispatcher()


def test_unknown_backends_are_refused():
    with (
        pytest.raises(BackendUnavailableError, match="by argument or by FUSEDRES_BACKEND"),
        use_backend("abacus"),
    ):
        pass
    assert "auto" in backend_names() and "reference" in backend_names()


def test_importing_needs_torch_alone_and_prints_nothing():
    code = (
        "import sys; sys.modules['triton'] = None; import fusedres;"
        "loaded = [m for m in ('rich', 'typer', 'matplotlib', 'sklearn', 'torchvision') if m in sys.modules];"
        "assert not loaded, loaded; import torch; assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
