"""What is written to a block after patching takes effect in the next call, as on an unpatched one."""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import assert_same_float64
from block_forms import ran_as
from same_model import assert_change_is_seen, assert_same_buffers, assert_same_step, images, pair, step
from spellings import FunctionalReLU, InPlaceAdd, NormInsideConv, TwoConvs
from torch import nn
from torch.nn import functional as F

import fusedres
from fusedres.models import Bottleneck


def write(path: str, value):
    head, _, name = path.rpartition(".")
    return lambda block: setattr(block.get_submodule(head), name, value)


def dilate(block):
    block.conv2.dilation = block.conv2.padding = (2, 2)


def scale_data(block):
    block.conv1.weight.data.mul_(2)  # does not move the version counter


def load(block):
    block.load_state_dict(
        {k: v + 0.25 if v.is_floating_point() else v for k, v in block.state_dict().items()}
    )


def replace_parameters(block):
    block.conv1.weight = nn.Parameter(block.conv1.weight.detach() * 2)
    block.bn2.bias = nn.Parameter(block.bn2.bias.detach() + 1)


def replace_convolution(block):
    block.conv2 = nn.Conv2d(16, 16, 1, bias=False).double()
    torch.nn.init.ones_(block.conv2.weight)


def add_bias(block):
    block.conv1.bias = nn.Parameter(torch.linspace(-1, 1, 16).double())
    block.bn1.eval()  # under batch statistics a bias cancels


def drop_affine(block):
    block.bn1.weight = block.bn1.bias = None


def drop_bias(block):
    block.bn2.bias = None


def drop_statistics(block):
    block.bn1.running_mean = block.bn1.running_var = block.bn1.num_batches_tracked = None
    block.bn1.eval()
    block.bn2.eval()


def norm_eval(block):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


CHANGES = {
    "eps": write("bn1.eps", 0.5),
    "dilation": dilate,
    "weight_data": scale_data,
    "load_state_dict": load,
    "parameters_replaced": replace_parameters,
    "convolution_replaced": replace_convolution,
    "convolution_bias": add_bias,
    "affine_false": drop_affine,
    "bn_without_bias": drop_bias,
    "no_statistics": drop_statistics,
    "norm_eval": norm_eval,
    "one_norm_eval": lambda block: block.bn2.eval(),
}
UNFUSED_CHANGES = {
    "norm_replaced": write("bn1", nn.GroupNorm(4, 16).double()),
    "activation_replaced": write("relu", nn.SiLU()),
    "instance_forward": write("forward", lambda x: x * 2),
    "submodule_forward": lambda block: setattr(block.bn1, "forward", lambda x: x * 2),
    "padding_mode": write("conv1.padding_mode", "circular"),
}


@pytest.mark.parametrize("recipe", ["separate", "gram"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name, recipe):
    assert_change_is_seen(CHANGES[name], recipe, InPlaceAdd if recipe == "separate" else Wide)


@pytest.mark.parametrize("name", UNFUSED_CHANGES)
def test_a_change_that_no_recipe_covers_runs_the_original(name):
    runs_as = (
        "separate" if name == "instance_forward" else "unfused"
    )  # the block's own: we are not called at all
    assert_change_is_seen(UNFUSED_CHANGES[name], runs_as=runs_as)


class Wide(TwoConvs):
    """A block that ends in an expanding 1x1 convolution, for recipe `gram`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)

    def forward(self, x):
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.bn3(self.conv3(out)))


class WithDropout(TwoConvs):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(self.drop(F.relu(self.bn1(self.conv1(x)))))) + x)


class WithFunction(TwoConvs):
    def __init__(self) -> None:
        super().__init__()
        self.function, self.options = F.relu, {"add": True}

    def forward(self, x):
        out = self.bn2(self.conv2(self.function(self.bn1(self.conv1(x)))))
        return self.function(out + x) if self.options["add"] else self.function(out)


def test_an_attribute_of_a_submodule():
    assert_change_is_seen(write("drop.p", 1.0), build=WithDropout, runs_as="unfused")


def test_a_function_kept_as_an_attribute():
    assert_change_is_seen(write("function", F.silu), build=WithFunction, runs_as="unfused")
    plain, fused = pair(NormInsideConv)
    for block in (plain, fused):
        block.conv1.activation = F.silu
    assert_same_step(plain, fused)


def test_an_option_changed_in_place():
    assert_change_is_seen(
        lambda block: block.options.update(add=False), build=WithFunction, runs_as="unfused"
    )


def test_a_forward_given_to_the_class(monkeypatch):
    class Local(FunctionalReLU):
        pass

    plain, fused = pair(Local)
    monkeypatch.setattr(Local, "forward", lambda self, x: self.bn1(self.conv1(x)))
    for p in (plain.conv2.weight, plain.bn2.weight, plain.bn2.bias):
        assert p.grad is None
    assert_same_step(plain, fused)
    code = fusedres.report(fused).blocks[0].code
    assert code.startswith("forward_replaced:") and code.endswith("Local.forward")


def test_patch_again_takes_a_replaced_submodule():
    plain, fused = pair()
    for block in (plain, fused):
        block.relu = nn.Sequential(nn.ReLU())
    fused(images())
    assert ran_as(fused, "unfused")
    plain(images())
    fusedres.patch(fused, recipe="separate", strict=True)
    assert_same_step(plain, fused)
    assert ran_as(fused, "separate")


@pytest.mark.parametrize("recipe", ["separate", "gram"])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
def test_momentum(momentum, recipe):
    plain, fused = pair(Wide, recipe)
    for block in (plain, fused):
        block.bn1.momentum = block.bn3.momentum = momentum
    for seed in range(3):
        plain(images(seed=seed)), fused(images(seed=seed))
    assert_same_buffers(plain, fused)
    assert fused.bn1.num_batches_tracked == 3 and ran_as(fused, recipe)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_statistics_no_longer_tracked(mode):
    """Buffers stay: batch statistics in training, without moving them, and the buffers in evaluation."""
    plain, fused = pair()
    for block in (plain, fused):
        block.bn1.track_running_stats = False
        getattr(block, mode)()
    assert_same_step(plain, fused)
    assert fused.bn1.num_batches_tracked == 0 and ran_as(fused, "separate")


def test_requires_grad_toggled_between_steps():
    plain, fused = pair()
    names = [name for name, _ in plain.named_parameters()]
    for frozen in ([], names[:2], names[2:5], names, []):
        for block in (plain, fused):
            for name, p in block.named_parameters():
                p.requires_grad_(name not in frozen)
        assert_same_step(plain, fused)
        assert ran_as(fused, "separate")
    with torch.no_grad():
        assert not fused(images()).requires_grad
    for block in (plain, fused):
        block.requires_grad_(False)
    assert not fused(images()).requires_grad


def test_training_and_evaluation_forwards_before_one_backward():
    plain, fused = pair()
    results = []
    for block in (plain, fused):
        x = images().requires_grad_()
        outputs = [block.train(mode)(x * k) for k, mode in ((1, True), (2, True), (3, False))]
        sum(y.square().sum() for y in outputs).backward(retain_graph=True)
        first = x.grad.clone()
        sum(y.square().sum() for y in outputs).backward()
        results.append((first, x.grad))
    assert_same_float64(results[1][0], results[0][0], "first backward")
    assert_same_float64(results[1][1], results[0][1], "both backwards")
    assert_same_buffers(plain, fused)


def expanding():
    return Bottleneck(16, 8, downsample=nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32)))


@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_evaluation_then_training_before_one_backward(recipe):
    """Gradients are those of the statistics that each forward saw; unpatched, evaluation's are of the moved ones."""
    plain, fused = pair(expanding, recipe)
    for mode in (False, True):
        plain.train(mode)(images()).square().sum().backward()
    sum(fused.train(mode)(images()).square().sum() for mode in (False, True)).backward()
    assert ran_as(fused, recipe)
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert_same_float64(q.grad, p.grad, name)
    assert_same_buffers(plain, fused)


def test_one_value_per_channel_raises_as_unpatched():
    """Also where only the shortcut's BN is in training mode."""

    for modes in (("bn1",), ("bn3",), ("downsample.1",)):
        plain, fused = pair(expanding)
        for block in (plain, fused):
            norm_eval(block)
            for path in modes:
                block.get_submodule(path).train()
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                block(images(1, 16, 1, 1))
    for block in (copy.deepcopy(plain), fused):
        norm_eval(block)
    assert_same_float64(step(fused, images(1, 16, 1, 1)).y, step(plain.eval(), images(1, 16, 1, 1)).y)


def test_an_empty_batch_is_taken_as_unpatched():
    plain, fused = pair()
    x = images()[:0]
    for block in (plain, fused):
        y = block(x)
        assert y.shape == x.shape
    assert_same_buffers(plain, fused)
