"""A patched model whose passes are replayed is bit by bit the one whose passes Python runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.models import BasicBlock, Bottleneck
from fusedres.ops.native import library
from fusedres.recording import replays

pytestmark = pytest.mark.skipif(not library.is_loaded(), reason="the compiled kernels are not built")
STEPS = 5


@pytest.fixture(autouse=True)
def recordings() -> Iterator[None]:
    replays.forget()
    yield
    replays.forget()


def network(block: type[BasicBlock] | type[Bottleneck]) -> nn.Module:
    """Three blocks, the first with a projection and a stride."""
    torch.manual_seed(0)
    width = 8
    out = width * block.expansion
    projection = nn.Sequential(nn.Conv2d(16, out, 1, 2, bias=False), nn.BatchNorm2d(out))
    blocks = block(16, width, 2, projection), block(out, width), block(out, width)
    return nn.Sequential(*blocks).to(memory_format=torch.channels_last)


def images(seed: int) -> Tensor:
    x = torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


class Run:
    """Everything that some steps of training show, and an inference after them."""

    def __init__(self, model: nn.Module, autocast: bool, checkpointed: bool = False) -> None:
        self.seen: dict[str, Tensor] = {}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for i in range(STEPS):
            x = images(i).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
            F.mse_loss(y.float(), torch.ones(y.shape)).backward()
            self.note(
                f"step {i}",
                {"y": y.detach(), "dx": x.grad, **gradients(model), **dict(model.named_buffers())},
            )
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in range(3):
                self.note("inference", {"y": model(images(9))})

    def note(self, when: str, tensors: dict[str, Tensor | None]) -> None:
        for name, t in tensors.items():
            if t is not None:
                self.seen[f"{when}: {name}"] = t.clone()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {f"d {name}": p.grad for name, p in model.named_parameters()}


def assert_same(by_python: Run, replayed: Run) -> None:
    assert by_python.seen.keys() == replayed.seen.keys()
    for name, expected in by_python.seen.items():
        actual = replayed.seen[name]
        assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride()), name
        assert torch.equal(actual, expected), name


def both(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, autocast: bool, checkpointed: bool = False
) -> tuple[Run, Run]:
    by_python = Run(copy.deepcopy(model), autocast, checkpointed)
    assert not replays.known()
    monkeypatch.setattr(replays, "DEVICES", {"cpu"})
    return by_python, Run(copy.deepcopy(model), autocast, checkpointed)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_training_and_inference(
    block: type[BasicBlock] | type[Bottleneck], recipe: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fusedres.patch(network(block), recipe=recipe)
    assert_same(*both(model, monkeypatch, autocast))
    problems = [p.problem for p in replays.known().values()]
    assert len(problems) >= 3
    # the CPU's kernels of float32 say whether their results are finite, and gram's are the reference: Python runs these
    ran_separate = recipe == "separate" or block is BasicBlock
    assert not (autocast and ran_separate) or problems == [None] * len(problems)


def test_frozen_statistics_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(Bottleneck)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model[0].requires_grad_(False)
    assert_same(*both(fusedres.patch(model, recipe="separate"), monkeypatch, True))


def test_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second forward moves running statistics too, as it does unpatched."""
    assert_same(*both(fusedres.patch(network(Bottleneck), recipe="separate"), monkeypatch, True, True))


def test_an_earlier_graph_runs_after_a_later_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call moves running statistics that an earlier one was given: autograd is not told, as torch's own tells it
    nothing."""
    monkeypatch.setattr(replays, "DEVICES", {"cpu"})
    model = fusedres.patch(network(Bottleneck), recipe="separate")
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            first, second = model(images(0)), model(images(1))
            (first.sum() + second.sum()).backward()
    assert any(p.recordings for p in replays.known().values())


def test_a_second_backward_is_refused_as_python_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "DEVICES", {"cpu"})
    model = fusedres.patch(network(Bottleneck), recipe="separate")
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            y = model(images(0)).sum()
            y.backward(retain_graph=True)
            kept = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            model.zero_grad()
            y.backward()
            for a, p in zip(kept, model.parameters(), strict=True):
                assert p.grad is not None and torch.equal(a, p.grad)
            with pytest.raises(RuntimeError, match="second time"):
                y.backward()
            model.zero_grad()
