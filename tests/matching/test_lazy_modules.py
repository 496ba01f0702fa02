"""Lazy modules that no call has initialised: what holds one is left alone, the rest is patched."""

from __future__ import annotations

import copy

import pytest
import torch
from block_forms import one_step
from library_models import TorchvisionResNet
from same_model import assert_same_step, images, pair
from spellings import InPlaceAdd, TwoConvs
from torch import nn
from torch.nn.parameter import UninitializedParameter

import fusedres
from fusedres.measuring.tune import tune


class WithShortcut(TwoConvs):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(nn.LazyConv2d(16, 1, bias=False), nn.LazyBatchNorm2d())

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def lazy(**modules: nn.Module) -> nn.Module:
    block = InPlaceAdd()
    for name, module in modules.items():
        setattr(block, name, module)
    return block


class Model(nn.Module):
    """An ordinary block, another, and a head."""

    def __init__(self, block: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = InPlaceAdd(), block, head

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3)))


BLOCKS = {
    "convolution": lambda: lazy(conv1=nn.LazyConv2d(16, 3, padding=1, bias=False)),
    "norm": lambda: lazy(bn2=nn.LazyBatchNorm2d()),
    "both": lambda: lazy(conv2=nn.LazyConv2d(16, 3, padding=1, bias=False), bn2=nn.LazyBatchNorm2d()),
    "shortcut": WithShortcut,
}


def rows(model: nn.Module) -> dict[str, str | None]:
    return {row.name: row.code if not row.matched else "matched" for row in fusedres.report(model).blocks}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_lazy_block_is_left_alone_until_it_has_been_called(name):
    model = Model(BLOCKS[name](), nn.LazyLinear(3))
    fusedres.patch(model, recipe="separate")
    assert rows(model) == {"first": "matched", "second": "uninitialised"}
    model(images().float())
    fusedres.patch(model, recipe="separate", strict=True)
    model.double()
    plain = fusedres.unpatch(copy.deepcopy(model))
    assert_same_step(plain, model)
    assert [row.runs_as for row in fusedres.report(model).blocks] == ["separate", "separate"]


@pytest.mark.parametrize("head", [nn.LazyLinear(3), nn.Sequential(nn.ReLU(), nn.LazyLinear(3))])
def test_a_lazy_head_hides_no_block(head):
    model = Model(InPlaceAdd(), head)
    assert rows(fusedres.patch(model, recipe="separate", dry_run=True)) == dict.fromkeys(
        ("first", "second"), "matched"
    )
    copied = copy.deepcopy(fusedres.patch(model, recipe="separate", strict=True))
    assert fusedres.is_patched(copied) and not fusedres.is_patched(fusedres.unpatch(copied))
    model(images().float())
    assert {row.runs_as for row in fusedres.report(model).blocks} == {"separate"}


def test_a_loaded_state_is_no_call():
    """Its parameters have their shapes then, but its class changes in its first call."""
    called = lazy(bn2=nn.LazyBatchNorm2d())
    called(images().float())
    model = nn.ModuleDict({"block": lazy(bn2=nn.LazyBatchNorm2d())})
    model["block"].load_state_dict(called.state_dict())
    with pytest.warns(UserWarning, match="uninitialised"):
        fusedres.patch(model)
    assert rows(model) == {"block": "uninitialised"}


def test_lazy_stems():
    model = TorchvisionResNet()
    model.conv1 = nn.LazyConv2d(32, 7, 2, 3, bias=False)
    assert rows(fusedres.patch(model)) == {"stem": "uninitialised", "layer1.0": "matched"}
    stem = nn.Sequential(nn.LazyConv2d(16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = stem

        def forward(self, x):
            return self.body(x)

    around = nn.ModuleDict({"stem": Stem(), "block": InPlaceAdd()})
    assert rows(fusedres.patch(around)) == {"stem": "uninitialised", "block": "matched"}
    around["stem"](torch.randn(1, 3, 16, 16))
    assert set(rows(fusedres.patch(around, strict=True)).values()) == {"matched"}


@pytest.mark.parametrize("name", ["norm", "shortcut"])
def test_what_runs_the_model_leaves_it_uninitialised(name):
    model = Model(BLOCKS[name](), nn.LazyLinear(3))
    before = torch.get_rng_state()
    assert fusedres.verify(model, images().float(), recipes="separate")
    comparison = fusedres.compare(model, images().float(), recipe="separate", rounds=2)
    assert comparison.phases[0].runs_as == {"separate": 2}
    fusedres.warmup(fusedres.patch(model), images().float())
    assert torch.equal(torch.get_rng_state(), before)
    assert tune(model, images().float(), rounds=5)
    assert rows(model) == {"first": "matched", "second": "uninitialised"}
    assert one_step(model, images().float(), torch.ones(3, 3)).y.shape == (3, 3)


def test_a_weight_that_loses_its_shape_after_patching():
    errors = []
    for block in pair():
        block.conv1.weight = UninitializedParameter()
        with pytest.raises(ValueError, match="uninitialized") as error:
            block(images())
        errors.append(str(error.value).partition(" at 0x")[0])
    assert errors[0] == errors[1]
