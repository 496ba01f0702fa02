"""verify: agrees on a right model, and says no on a wrong one."""

from __future__ import annotations

import pytest
import torch
from called_ops import change_results
from torch import nn

import fusedres
from fusedres.blocks import RECIPES
from fusedres.models import cifar_resnet
from fusedres.ops.contract import BnAddReluBackwardInput, BnAddReluForward, BnStats, op_name


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = cifar_resnet(20)

    def forward(self, x):
        return {"logits": self.net(x), "extra": (self.net.fc.bias, "text")}


class FusedInTraining(nn.Module):
    """In evaluation mode its blocks have hooks, and so run unfused."""

    def __init__(self, hooked: nn.Module) -> None:
        super().__init__()
        self.hooked = hooked

    def train(self, mode: bool = True):
        if mode:
            for module in self.modules():
                module._forward_pre_hooks.clear()
        return super().train(mode)

    def forward(self, x):
        return self.hooked(x)


def test_a_right_model_passes_and_is_left_alone():
    model = DictOutput()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    report = fusedres.verify(model, torch.randn(3, 3, 8, 8))
    assert report and len(report.checks) == 12 * len(RECIPES)
    assert report.fused_blocks == dict.fromkeys(RECIPES, 10)
    assert "ok" in str(report) and report.as_dict()["passed"]
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not fusedres.is_patched(model) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("op", [BnAddReluForward, BnAddReluBackwardInput, BnStats], ids=op_name)
def test_a_wrong_kernel_fails(monkeypatch, op):
    change_results(monkeypatch, op, lambda result: (result[0] * 1.001, *result[1:]))
    with fusedres.use_backend("reference"):
        report = fusedres.verify(cifar_resnet(20), torch.randn(3, 3, 8, 8), recipes=("separate",))
    assert not report and "FAIL" in str(report)


def test_a_model_where_nothing_runs_fused_does_not_pass():
    model = cifar_resnet(20)
    for block in [*model.layer1, *model.layer2, *model.layer3, model]:
        block.conv1.register_forward_hook(lambda *args: None)
    report = fusedres.verify(model, torch.randn(2, 3, 8, 8), recipes=("separate",))
    assert not report and all(check.passed for check in report.checks)
    assert report.nothing_ran_fused and report.reasons == {"hooks": 10}
    assert str(report) == "nothing was compared, for no block ran fused (hooks: 10)"


def test_a_block_that_runs_fused_in_one_mode_was_compared():
    model = cifar_resnet(20)
    for block in [*model.layer1, *model.layer2, *model.layer3, model]:
        block.conv1.register_forward_pre_hook(lambda *args: None)
    report = fusedres.verify(FusedInTraining(model), torch.randn(2, 3, 8, 8), recipes=("separate",))
    assert report and report.fused_blocks == {"separate": 10} and report.reasons == {"hooks": 10}


def test_progress_is_told_between_steps():
    told = []
    model, x = cifar_resnet(20), torch.randn(2, 3, 8, 8)
    fusedres.verify(model, x, recipes="separate", progress=lambda *step: told.append(step))
    assert told == [("checking", done, 4) for done in range(5)]


def test_a_frozen_model_has_no_gradients_to_compare():
    report = fusedres.verify(
        cifar_resnet(20).requires_grad_(False), torch.randn(2, 3, 8, 8), recipes="separate"
    )
    assert report and [check.what for check in report.checks if "gradients" in check.what] == []
    assert len(report.checks) == 10


def test_gradients_are_compared_whatever_the_callers_mode():
    with torch.no_grad():
        report = fusedres.verify(cifar_resnet(20), torch.randn(2, 3, 8, 8), recipes=["gram"])
    assert report and len([check for check in report.checks if "gradients" in check.what]) == 2


def test_a_recipe_may_be_given_by_its_name_alone():
    report = fusedres.verify(cifar_resnet(20), torch.randn(2, 3, 8, 8), recipes="gram")
    assert report and report.fused_blocks == {"gram": 10}


def test_a_model_without_blocks_is_refused_by_the_function_that_was_called():
    with pytest.raises(
        fusedres.UnsupportedModelError, match=r"fusedres\.verify: no residual block found in Linear"
    ):
        fusedres.verify(nn.Linear(2, 2), torch.randn(2, 2))
