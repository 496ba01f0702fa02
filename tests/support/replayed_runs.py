"""Steps of a small network whose passes Python runs, and the same steps replayed, on any device."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedres.models import BasicBlock, Bottleneck
from fusedres.recording import replays

STEPS = 5


def network(block: type[BasicBlock] | type[Bottleneck]) -> nn.Module:
    """Three blocks, the first with a projection and a stride."""
    torch.manual_seed(0)
    width = 8
    out = width * block.expansion
    projection = nn.Sequential(nn.Conv2d(16, out, 1, 2, bias=False), nn.BatchNorm2d(out))
    blocks = block(16, width, 2, projection), block(out, width), block(out, width)
    return nn.Sequential(*blocks).to(memory_format=torch.channels_last)


def images(seed: int, device: str = "cpu") -> Tensor:
    x = torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(seed))
    return x.to(device).contiguous(memory_format=torch.channels_last)


class Run:
    """Everything that some steps of training show, and an inference after them."""

    def __init__(self, model: nn.Module, autocast: bool, checkpointed: bool = False) -> None:
        self.seen: dict[str, Tensor] = {}
        device = str(next(model.parameters()).device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for i in range(STEPS):
            x = images(i, device).requires_grad_()
            with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=autocast):
                y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
            F.mse_loss(y.float(), torch.ones_like(y, dtype=torch.float32)).backward()
            self.note(
                f"step {i}",
                {"y": y.detach(), "dx": x.grad, **gradients(model), **dict(model.named_buffers())},
            )
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with (
            torch.inference_mode(),
            torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=autocast),
        ):
            for _ in range(3):
                self.note("inference", {"y": model(images(9, device))})

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
    monkeypatch.setattr(replays, "DEVICES", set())
    by_python = Run(copy.deepcopy(model), autocast, checkpointed)
    assert not replays.known()
    monkeypatch.setattr(replays, "DEVICES", {"cpu", "cuda"})
    return by_python, Run(copy.deepcopy(model), autocast, checkpointed)
