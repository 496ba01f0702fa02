"""Calls of a patched block inside a CUDA graph's capture: fused where such a call ran before, else the original."""

from __future__ import annotations

import copy

import pytest
import torch
from block_forms import bottleneck
from torch import nn

import fusedres
from fusedres.patching import warm
from fusedres.patching.state import STATE


class Capture:
    """Whether one is under way; there need be no GPU."""

    def __init__(self) -> None:
        self.now, self.asked = False, 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.now


@pytest.fixture
def capture(monkeypatch):
    found = Capture()
    monkeypatch.setattr(warm, "on_gpu", lambda x: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", found)
    return found


@pytest.fixture
def block():
    return fusedres.patch(bottleneck()(), recipe="gram", backend="reference")


@pytest.fixture
def x():
    return torch.randn(2, 32, 5, 5).to(memory_format=torch.channels_last)


def found(block: nn.Module) -> tuple[str | None, str | None]:
    (row,) = fusedres.report(block).blocks
    return row.runs_as, row.code and row.code.partition(":")[0]


def captured(capture: Capture, block: nn.Module, x: torch.Tensor) -> tuple[str | None, str | None]:
    capture.now = True
    block(x)
    capture.now = False
    return found(block)


def test_warmed_as_the_reason_advises_it_is_fused(capture, block, x):
    assert captured(capture, block, x) == ("unfused", "not_warm")
    fusedres.warmup(block, x)
    assert captured(capture, block, x) == ("gram", None)


def test_what_is_computed_cold_is_what_the_original_computes(capture, block, x):
    plain = fusedres.unpatch(copy.deepcopy(block))
    capture.now = True
    assert torch.equal(block(x), plain(x))


def other_size(block, x):
    return x[:, :, :4].contiguous(memory_format=torch.channels_last)


def other_dtype(block, x):
    block.double()
    return x.double()


def other_mode(block, x):
    block.bn2.eval()
    return x


def frozen(block, x):
    block.requires_grad_(False)
    return x


def patched_again(block, x):
    fusedres.patch(block, recipe="gram", backend="reference")
    return x


def other_recipe(block, x):
    vars(block)[STATE].recipe = "separate"
    return x


def other_backend(block, x):
    vars(block)[STATE].backend = "auto"
    return x


@pytest.mark.parametrize(
    "change",
    [other_size, other_dtype, other_mode, frozen, patched_again, other_recipe, other_backend],
    ids=lambda f: f.__name__,
)
def test_another_kind_of_call_is_cold(change, capture, block, x):
    block(x)
    assert captured(capture, block, x) == ("gram", None)
    x = change(block, x)
    assert captured(capture, block, x) == ("unfused", "not_warm")
    block(x)
    assert captured(capture, block, x)[1] is None


def test_a_copy_is_as_warm_as_what_it_was_copied_from(capture, block, x):
    block(x)
    other = copy.deepcopy(block)
    assert captured(capture, other, x) == ("gram", None)
    smaller = other_size(block, x)
    other(smaller)
    assert captured(capture, block, smaller) == ("unfused", "not_warm")


def test_inputs_of_ever_other_sizes_do_not_fill_the_memory(capture, block, monkeypatch):
    monkeypatch.setattr(warm, "MOST_KNOWN", 3)
    inputs = [torch.randn(2, 32, 5, 3 + n) for n in range(5)]
    for x in inputs:
        block(x)
    assert len(vars(block)[STATE].warm) <= 3
    assert captured(capture, block, inputs[-1]) == ("gram", None)


def test_on_a_cpu_nothing_is_asked_or_noted(block, x, monkeypatch):
    capture = Capture()
    capture.now = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", capture)
    block(x)
    assert found(block) == ("gram", None)
    assert not capture.asked and not vars(block)[STATE].warm


def test_a_call_traced_into_a_graph_is_none_of_it(capture, block, x):
    capture.now = True
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(block, backend=backend, fullgraph=True)(x)
    assert any("residual_block_forward" in name for name in seen)
    assert not vars(block)[STATE].warm
