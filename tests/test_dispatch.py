"""Which backend serves an op: requests by argument, context and environment, and what a refusal says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fusedres import BackendUnavailableError, use_backend
from fusedres.backends.reference import ReferenceOps
from fusedres.dispatch import Dispatcher, backend_names, dispatcher
from fusedres.raw_ops import RAW_OPS


class Picky(ReferenceOps):
    """Serves bn_stats on float32 only."""

    name = "picky"

    def supports(self, op, *args, **kwargs):
        if op != "bn_stats":
            return "not_implemented"
        return None if args[0].dtype is torch.float32 else "dtype"

    def bn_stats(self, c):
        return c.sum(), c.sum()


def test_a_call_goes_to_the_first_backend_that_supports_it():
    ops = Dispatcher((Picky(), ReferenceOps()))
    c = torch.ones(2, 3, 2, 2)
    assert ops.bn_stats(c)[0] == 24
    assert torch.equal(ops.bn_stats(c.double())[0], torch.ones(3, dtype=torch.float64))
    assert ops.explain("bn_stats", c.double()) == [("picky", "dtype"), ("reference", None)]
    assert ops.serving("bn_stats", c) == "picky" and ops.serving("gram", c) == "reference"


def test_every_raw_op_is_a_method():
    ops = dispatcher("reference")
    assert all(callable(getattr(ops, op)) for op in RAW_OPS)
    assert all(hasattr(ReferenceOps, op) for op in RAW_OPS)


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
