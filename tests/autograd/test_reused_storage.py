"""Backward may write over what forward saved, where nobody else can read it any more, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from block_forms import FORMS, one_step, patched, tensors_for
from called_ops import see_ops
from torch.utils.checkpoint import checkpoint

from fusedres.ops.contract import BnAddReluBackwardInput
from fusedres.ops.native import library, reasons

if not library.is_built():
    # the other backends write into nothing that they are given
    pytest.skip("no compiled library in this installation", allow_module_level=True)

BY_NAME = {form.name: form for form in FORMS}
NAMES = ("basic", "bottleneck", "bottleneck-projection", "bottleneck-frozen", "bottleneck-plain")


class Reused:
    """For each call of the join's backward, whether it may take the storage of what was saved."""

    def __init__(self, seen):
        self.seen = seen

    def joins(self):
        return [op for op in self.seen if type(op) is BnAddReluBackwardInput and not op.reuse_dy]

    def __eq__(self, expected):
        return [op.reuse_c for op in self.joins()] == expected


@pytest.fixture
def reused(monkeypatch):
    return Reused(see_ops(monkeypatch))


def fused(name):
    form = BY_NAME[name]
    block = form.build().to(memory_format=torch.channels_last)
    x, dy = tensors_for(form, block, torch.float32)
    return patched(block, "separate", "native"), x, dy


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_that_is_kept_gives_the_same_gradients_again(name, reused):
    block, x, dy = fused(name)
    leaf = x.clone().requires_grad_()
    y = block(leaf)
    wanted = [leaf, *block.parameters()]
    runs = [torch.autograd.grad(y, wanted, dy, retain_graph=keep) for keep in (True, True, False)]
    assert reused == [False, False, True]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, wanted, dy)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_hook_holds_stays_as_it_was(name, reused):
    block, x, dy = fused(name)
    held = []

    def pack(tensor):
        held.append((tensor, tensor.clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x.clone().requires_grad_())
    y.backward(dy)
    assert reused == [False] and held
    assert all(torch.equal(tensor, before) for tensor, before in held)


def test_offloaded_and_checkpointed_blocks_give_the_same_gradients(reused):
    block, x, dy = fused("bottleneck")
    expected = one_step(copy.deepcopy(block), x, dy)
    for run in (
        lambda a: checkpoint(block, a, use_reentrant=False),
        lambda a: checkpoint(block, a, use_reentrant=True),
    ):
        leaf = x.clone().requires_grad_()
        run(leaf).backward(dy)
        assert torch.equal(leaf.grad, expected.dx)
    with torch.autograd.graph.save_on_cpu():
        leaf = x.clone().requires_grad_()
        y = block(leaf)
    y.backward(dy)
    assert torch.equal(leaf.grad, expected.dx)
    assert reused == [True, False, True, False]


def test_the_input_and_its_gradient_stay_apart(reused):
    """x may be what another block saved, and dy may be another branch's: neither is written."""
    block, x, dy = fused("bottleneck-projection")
    before, leaf = dy.clone(), x.clone().requires_grad_()
    block(leaf).backward(dy)
    assert reused == [True]
    assert torch.equal(leaf.detach(), x) and torch.equal(dy, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_shortcut_takes_its_gradient_through_the_mask_where_it_is_added(dtype, reused):
    """Then nobody stores it before; where the library adds it, somebody must."""
    form = BY_NAME["bottleneck"]
    block = form.build().to(dtype, memory_format=torch.channels_last)
    x, dy = tensors_for(form, block, dtype)
    patched(block, "separate", "native")(x.requires_grad_()).backward(dy)
    assert [op.save_dz for op in reused.joins()] == [dtype not in reasons.product_dtypes()]
