"""A patched model whose passes are replayed is bit by bit the one whose passes Python runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from replayed_runs import assert_same, both, images, network
from torch import nn

import fusedres
from fusedres.models import BasicBlock, Bottleneck
from fusedres.modules.derived_class import STATE
from fusedres.ops.native import library
from fusedres.recording import replays
from fusedres.recording.bundle import Bundle

pytestmark = pytest.mark.skipif(not library.is_loaded(), reason="the compiled kernels are not built")


@pytest.fixture(autouse=True)
def recordings() -> Iterator[None]:
    replays.forget()
    yield
    replays.forget()


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


FUSED = 2  # of three blocks: autocast casts the first one's input


def bundles() -> list[Bundle]:
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is Bundle]


def replayed(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A patched model whose passes are all replayed from now on."""
    monkeypatch.setattr(replays, "DEVICES", {"cpu"})
    model = fusedres.patch(network(Bottleneck), recipe="separate")
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(4):
            model(images(i)).sum().backward()
    model.zero_grad()
    return model


def test_what_backward_needs_stays_with_the_library_until_it_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = replayed(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images(0))
        assert len(bundles()) == FUSED
        y.sum().backward(retain_graph=True)
        assert len(bundles()) == FUSED
        y.sum().backward()
        assert not bundles()
        y = model(images(0))
        assert len(bundles()) == FUSED
    del y
    assert not bundles()


def test_hooks_on_saved_tensors_see_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = replayed(monkeypatch), []
    with torch.autocast("cpu", torch.bfloat16), monkeypatch.context() as by_python:
        for devices in ({"cpu"}, set()):
            packed: list[torch.Size] = []
            by_python.setattr(replays, "DEVICES", devices)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, to=packed: to.append(t.shape) or t, lambda t: t
            ):
                y = model(images(0))
            assert not bundles()
            y.sum().backward()
            seen.append(packed)
    assert seen[0] == seen[1] and len(seen[0]) > len([*model.parameters()])


@pytest.mark.parametrize("how", ["by Python", "as a graph"])
def test_another_backward_of_a_replayed_forward(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a forward that Python ran."""
    model = replayed(monkeypatch)
    found = []
    for is_replayed in (True, False):
        with torch.autocast("cpu", torch.bfloat16), nullcontext() if is_replayed else replays.off():
            y = model(images(0)).float().sum()
        assert len(bundles()) == (FUSED if is_replayed else 0)
        with replays.off() if how == "by Python" else nullcontext():
            gradients = torch.autograd.grad(y, list(model.parameters()), create_graph=how == "as a graph")
        found.append([gradient.detach() for gradient in gradients])
        del y, gradients
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("devices", [set(), {"cpu"}], ids=["by Python", "replayed"])
def test_an_input_that_is_left_of_a_transformation(
    devices: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.func's wrapper around a tensor has no storage that a kernel could read."""
    monkeypatch.setattr(replays, "DEVICES", devices)
    block = fusedres.patch(network(Bottleneck)[1], recipe="separate")  # type: ignore[index]
    x = torch.randn(4, 32, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    left: list[torch.Tensor] = []
    torch.func.grad(lambda t: (left.append(t), t.sum())[1])(x)
    for _ in range(4):
        found = []
        for given in (left[0], x):
            with torch.autocast("cpu", torch.bfloat16):
                y = block(given)
            found.append([y, *torch.autograd.grad(y.float().square().sum(), list(block.parameters()))])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
    assert block.__dict__[STATE].runs_as == "separate"
    assert [p.problem for p in replays.known().values()] == [None, None] * len(devices)
