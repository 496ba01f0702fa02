"""On a GPU a replayed model is bit by bit the one whose passes Python runs, for every backend that launches kernels.

Without one `tests/recording/` replays on the CPU, and on the stand-in for a GPU.
"""

from itertools import permutations

import pytest
import torch
from replayed_runs import assert_same, both, network

import fusedres
from fusedres.models import BasicBlock, Bottleneck
from fusedres.ops.dispatch import LOADERS
from fusedres.ops.native import casts
from fusedres.ops.reference import REFERENCE
from fusedres.recording import replays

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)


@pytest.fixture(autouse=True)
def recordings(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    replays.forget()
    yield
    replays.forget()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("backend", [name for name in LOADERS if name != REFERENCE.name])
@pytest.mark.parametrize(
    ("recipe", "block"),
    [("separate", BasicBlock), ("prologue", BasicBlock), ("separate", Bottleneck), ("gram", Bottleneck)],
)
def test_training_and_inference(recipe, block, backend, autocast, monkeypatch):
    model = fusedres.patch(network(block).cuda(), recipe=recipe, backend=backend)
    assert_same(*both(model, monkeypatch, autocast))
    problems = [p.problem for p in replays.known().values()]
    assert problems == [None] * len(problems) and len(problems) >= 3


FLOATS = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(("source", "target"), permutations(FLOATS, 2))
def test_casts_are_torchs(source, target):
    """Of many tensors, some of which begin at no multiple of 16 bytes."""
    sizes = 1, 7, 8, 4097, 1 << 20
    given = [
        (torch.randn(n + 1, device="cuda") * 1e3).to(source)[n % 2 : n % 2 + n]
        for n in (*sizes, *sizes, *sizes, *sizes)
    ]
    given[0].fill_(torch.nan)
    given[1][3] = torch.inf
    for a, t in zip(casts.cast(given, target), given, strict=True):
        assert torch.equal(a.isnan(), t.isnan()) and torch.equal(a.nan_to_num(), t.to(target).nan_to_num())


def test_a_model_on_another_gpu_than_the_current_one(monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: with one there is no other than the current")
    model = fusedres.patch(network(Bottleneck).to("cuda:1"), recipe="gram")
    assert_same(*both(model, monkeypatch, True))
