"""What each call of a patched block is checked for: the code in the report, and that the original forward ran."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from block_forms import ran_as, randomize
from spellings import InPlaceAdd
from torch import nn

import fusedres
from fusedres.models import BasicBlock


class TestPerCallGuards:
    """What a call is guarded against, each with its code; the original forward must have run."""

    @staticmethod
    def outcome(model, *args, **kwargs):
        with contextlib.suppress(ValueError, RuntimeError):  # the original forward may reject the input
            model(*args, **kwargs)
        (row,) = fusedres.report(model).blocks
        assert row.runs_as == "unfused"
        return row.code

    @pytest.fixture
    def block(self):
        return fusedres.patch(randomize(InPlaceAdd()), recipe="separate")

    def test_replaced_submodule(self, block):
        block.bn1 = nn.SyncBatchNorm(16)
        assert self.outcome(block, torch.randn(2, 16, 6, 6)) == "module_replaced:bn1"

    def test_replaced_activation(self, block):
        block.relu = nn.SiLU()
        assert self.outcome(block, torch.randn(2, 16, 6, 6)) == "module_replaced:relu"

    def test_added_submodule(self, block):
        block.extra = nn.Identity()
        assert self.outcome(block, torch.randn(2, 16, 6, 6)) == "module_replaced:extra"

    def test_changed_flag(self):
        block = fusedres.patch(BasicBlock(16, 16), recipe="separate")
        block.residual = False
        assert self.outcome(block, torch.randn(2, 16, 6, 6)) == "attribute_changed:residual"

    def test_rewritten_stride(self, block):
        block.conv2.stride = (2, 2)
        assert (
            self.outcome(block, torch.randn(2, 16, 6, 6))
            == "geometry_changed:conv2, gives 3x3, the shortcut 6x6"
        )

    def test_late_hook(self, block):
        seen = []
        handle = block.bn1.register_forward_hook(lambda *a: seen.append(1))
        assert self.outcome(block, torch.randn(2, 16, 6, 6)) == "hooks:bn1"
        assert seen
        handle.remove()
        block(torch.randn(2, 16, 6, 6))
        assert ran_as(block, "separate")

    def test_global_hook(self, block):
        handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
        try:
            assert self.outcome(block, torch.randn(2, 16, 6, 6)) == "hooks:on all modules"
        finally:
            handle.remove()

    def test_instance_forward(self, block):
        block.conv1.forward = lambda x: x
        assert self.outcome(block, torch.randn(2, 16, 6, 6)) == "instance_forward:conv1"

    @pytest.mark.parametrize(
        ("x", "code"),
        [
            (torch.randn(2, 8, 6, 6), "input_channels:input of conv1, 8 channels, needed 16"),
            (torch.randn(16, 6, 6), "input_rank:input, [16, 6, 6]"),
            (torch.randn(2, 16, 6, 6).double(), "dtype:conv1.weight, float32, needed float64"),
            (torch.randn(0, 16, 6, 6), "empty_batch:input, [0, 16, 6, 6]"),
            (torch.randn(1, 16, 1, 1), "single_value_per_channel:bn1"),
            (torch.randn(2, 16, 6, 6, device="meta"), "device:input, meta"),
        ],
        ids=["channels", "rank", "dtype", "empty", "one-row", "device"],
    )
    def test_unfit_input(self, block, x, code):
        assert self.outcome(block, x) == code

    def test_what_eager_rejects_raises_the_same(self, block):
        for x in (torch.randn(2, 8, 6, 6), torch.randn(1, 16, 1, 1), torch.randn(2, 16, 6, 6).double()):
            errors = []
            for model in (fusedres.unpatch(copy.deepcopy(block)), block):
                with pytest.raises((ValueError, RuntimeError)) as caught:
                    model(x)
                errors.append((caught.type, str(caught.value)))
            assert errors[0] == errors[1]

    def test_keyword_call(self, block):
        assert self.outcome(block, x=torch.randn(2, 16, 6, 6)) == "signature:x="

    def test_vmap_and_forward_mode(self, block):
        block.eval()
        torch.func.vmap(block)(torch.randn(3, 2, 16, 6, 6))
        assert fusedres.report(block).blocks[0].code == "tracing:torch.func"
        x = torch.randn(2, 16, 6, 6)
        with torch.autograd.forward_ad.dual_level():
            block(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert fusedres.report(block).blocks[0].code == "forward_ad"

    def test_autocast_with_float32_input_keeps_the_result_type(self, block):
        plain = fusedres.unpatch(copy.deepcopy(block))
        x = torch.randn(2, 16, 6, 6)
        with torch.autocast("cpu", torch.bfloat16):
            assert block(x).dtype == plain(x).dtype
            assert fusedres.report(block).blocks[0].code == "dtype:input, float32, needed bfloat16"
            assert block(x.bfloat16()).dtype == plain(x.bfloat16()).dtype
            assert ran_as(block, "separate")
