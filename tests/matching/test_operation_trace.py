"""Which operations a recipe really runs, read from a trace of every operation and not from the report."""

from __future__ import annotations

import copy

import pytest
import torch
from block_forms import FORMS, patched, tensors_for
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WIDE = next(f for f in FORMS if f.name == "bottleneck")


class Trace(TorchDispatchMode):
    """Names of the operations, and the storages they allocated, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.allocated: dict[int, torch.Size] = {}
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.allocated[t.untyped_storage().data_ptr()] = t.shape
                self.kept.append(t)  # an address must not be used twice within the trace
        return result


@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_no_batch_norm_of_torch_runs(recipe):
    block = patched(WIDE.build(), recipe)
    x, dy = tensors_for(WIDE, block, torch.float32)
    with Trace() as trace:
        y = block(x.requires_grad_())
        y.backward(dy)
    assert type(y.grad_fn).__name__ == "ResidualBlockBackward"
    assert not [name for name in trace.names if "batch_norm" in name]
    assert "aten::threshold_backward" not in trace.names


def saved_shapes(block, x) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    return shapes


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_gram_saves_no_wide_tensor_but_its_input(training):
    block = patched(copy.deepcopy(WIDE.build()).train(training), "gram")
    x, _ = tensors_for(WIDE, block, torch.float32)
    wide = [s for s in saved_shapes(block, x.requires_grad_()) if s == tuple(x.shape)]
    assert wide == [tuple(x.shape)]


def test_separate_saves_the_raw_output():
    """The counter-test: the recipe that needs c3 saves it."""
    block = patched(WIDE.build(), "separate")
    x, _ = tensors_for(WIDE, block, torch.float32)
    wide = [s for s in saved_shapes(block, x.requires_grad_()) if s == tuple(x.shape)]
    assert len(wide) == 2
