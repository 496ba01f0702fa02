"""Steps of two patched modules that are alike: one is run by Python, and calls of the other are bound."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedres.recording import replays

WARM = 6  # steps until every call is bound: it is read, watched, recorded and replayed first


def images(*shape: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*(shape or (3, 16, 6, 6)), generator=generator).bfloat16()
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def step(module: nn.Module, x: Tensor, wants_dx: bool = True) -> dict[str, Tensor | None]:
    """Everything that a training step shows."""
    module.zero_grad(set_to_none=True)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(wants_dx)
    with autocast():
        y = module(x)
    y.backward(images(*y.shape, seed=3))
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(module.named_buffers())}


def assert_equal(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """Bit by bit, and in layout: a replay runs what Python runs."""
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        actual = found[name]
        assert (actual is None) == (exact is None), name
        if actual is not None and exact is not None:
            assert (actual.dtype, actual.stride()) == (exact.dtype, exact.stride()), name
            assert torch.equal(actual, exact), name


def assert_same_step(
    by_python: nn.Module, patched: nn.Module, x: Tensor | None = None, wants_dx: bool = True
) -> None:
    x = images() if x is None else x
    with replays.off():
        expected = step(by_python, x, wants_dx)
    assert_equal(step(patched, x, wants_dx), expected)


def forwards(by_python: nn.Module, patched: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, under autocast."""
    with autocast():
        with replays.off():
            expected = by_python(x)
        return expected, patched(x)
