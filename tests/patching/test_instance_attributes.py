"""Attributes that one instance has and its class does not know: the original forward uses them, so it runs."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from block_forms import ran_as
from same_model import assert_same_step, images, pair
from spellings import InPlaceAdd, TwoConvs
from torch import nn

import fusedres
from fusedres.models import Bottleneck, resnet18


def doubled(self, x, weight, bias):
    return F.conv2d(x, weight * 2, bias, self.stride, self.padding)


def circular(self, x, weight, bias):
    sides = [side for padding in reversed(self.padding) for side in (padding, padding)]
    return F.conv2d(F.pad(x, sides, mode="circular"), weight, bias, self.stride)


def convolutions(function):
    """Gives every convolution of a module its own `_conv_forward`."""

    def change(module):
        for conv in [m for m in module.modules() if isinstance(m, nn.Conv2d)]:
            conv._conv_forward = types.MethodType(function, conv)

    return change


def centred_norm(block):
    """A norm that subtracts one on its way into the call."""
    norm = block.bn1
    call = type(norm)._call_impl
    norm._call_impl = lambda x: call(norm, x) - 1


def compiled_call(block):
    """As `block.conv2.compile()` leaves it, with a compiler that doubles."""
    conv = block.conv2
    conv._compiled_call_impl = lambda x: 2 * conv._call_impl(x)


class WithHelper(TwoConvs):
    def act(self, x):
        return F.relu(x)

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(out)) + x)


class WithSwitch(TwoConvs):
    """Reads an attribute that no constructor sets."""

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + x) if getattr(self, "add", True) else F.relu(out)


CHANGES = {
    "circular": (InPlaceAdd, convolutions(circular), "conv1._conv_forward"),
    "doubled": (InPlaceAdd, convolutions(doubled), "conv1._conv_forward"),
    "norm_call": (InPlaceAdd, centred_norm, "bn1._call_impl"),
    "compiled_call": (InPlaceAdd, compiled_call, "conv2._compiled_call_impl"),
    "helper": (WithHelper, lambda block: setattr(block, "act", F.silu), "act"),
}


@pytest.mark.parametrize("recipe", ["separate", "gram"])
@pytest.mark.parametrize("name", CHANGES)
def test_set_after_patching(name, recipe):
    build, change, attribute = CHANGES[name]
    plain, fused = pair(build, recipe)
    fused(images()), plain(images())
    change(plain), change(fused)
    assert_same_step(plain, fused)
    assert fusedres.report(fused).blocks[0].code == f"instance_shadows:{attribute}"
    for block in (plain, fused):
        for module in block.modules():
            for key in ("_conv_forward", "_call_impl", "_compiled_call_impl", "act"):
                vars(module).pop(key, None)
    assert_same_step(plain, fused)
    assert ran_as(fused, "separate")


@pytest.mark.parametrize("name", CHANGES)
def test_set_before_patching(name):
    build, change, attribute = CHANGES[name]
    plain, fused = build().double(), build().double()
    fused.load_state_dict(plain.state_dict())
    change(plain), change(fused)
    with pytest.warns(UserWarning, match="no residual block"):
        fusedres.patch(fused, recipe="separate")
    assert_same_step(plain, fused)
    code = fusedres.report(fused).blocks[0].code
    assert code == f"instance_shadows:{attribute}" or name == "helper"  # F.silu shows in the dataflow too
    assert code is not None


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_stem_of_a_model(when):
    plain = resnet18(num_classes=3).double().eval()
    fused = copy.deepcopy(plain)
    stem = types.MethodType(circular, plain.conv1)
    plain.conv1._conv_forward = stem
    if when == "after":
        fusedres.patch(fused, recipe="separate")
    fused.conv1._conv_forward = types.MethodType(circular, fused.conv1)
    if when == "before":
        fusedres.patch(fused, recipe="separate")
    x = images(1, 3, 32, 32)
    assert torch.allclose(plain(x), fused(x), rtol=1e-10, atol=0)
    code = next(block.code for block in fusedres.report(fused).blocks if block.name == "stem")
    assert code == "instance_shadows:conv1._conv_forward"


@pytest.mark.parametrize("build", [InPlaceAdd, lambda: Bottleneck(16, 4)], ids=["basic", "bottleneck"])
def test_in_a_compiled_graph(build):
    plain, fused = pair(build)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same_step(plain, compiled._orig_mod)
    x = images()
    before, _ = compiled(x), plain(x)
    for block in (plain, fused):
        convolutions(doubled)(block)
    assert torch.allclose(compiled(x), plain(x), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(compiled(x), before)


def test_an_attribute_that_the_forward_asks_for():
    plain, fused = pair(WithSwitch)
    fused(images()), plain(images())
    plain.add = fused.add = False
    assert_same_step(plain, fused)
    assert fusedres.report(fused).blocks[0].code == "attribute_changed:add"


def doubled_weight(block):
    vars(block.conv2)["weight"] = 2 * block.conv2.weight.detach()


def other_statistics(block):
    object.__setattr__(block.bn2, "running_mean", block.bn2.running_mean + 1)


def convolution_that_is_not_registered(block):
    other = nn.Conv2d(16, 16, 3, padding=1).double()
    nn.init.ones_(other.weight), nn.init.zeros_(other.bias)
    object.__setattr__(block, "conv1", other)


HIDING = {
    "weight": (doubled_weight, "instance_shadows:conv2.weight"),
    "running_mean": (other_statistics, "instance_shadows:bn2.running_mean"),
    "conv1": (convolution_that_is_not_registered, "instance_shadows:conv1"),
}


@pytest.mark.parametrize("name", HIDING)
def test_what_hides_a_parameter_a_buffer_or_a_submodule(name):
    change, code = HIDING[name]
    plain, fused = pair(InPlaceAdd)
    fused(images()), plain(images())
    change(plain), change(fused)
    compiled = torch.compile(copy.deepcopy(fused), backend="aot_eager", fullgraph=True)
    expected = copy.deepcopy(plain)(images())
    assert torch.allclose(compiled(images()), expected, rtol=1e-10, atol=1e-12)
    assert_same_step(plain, fused)
    assert fusedres.report(fused).blocks[0].code == code


def test_what_hides_behind_an_attribute_that_was_seen():
    plain, fused = pair(InPlaceAdd)
    for block in (plain, fused):
        block.conv1.tag = 1
    assert_same_step(plain, fused)
    assert ran_as(fused, "separate")
    for block in (plain, fused):
        del block.conv1.tag
        block.conv1._conv_forward = types.MethodType(doubled, block.conv1)
        block.conv1.tag = 1
    assert_same_step(plain, fused)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_attribute_that_the_forward_asks_for_in_a_graph(when):
    plain, fused = pair(WithSwitch)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    if when == "after":
        plain(images()), compiled(images())
    plain.add = fused.add = False
    assert torch.allclose(compiled(images()), plain(images()), rtol=1e-10, atol=1e-12)


def test_attributes_that_nobody_asks_for():
    """A tag on the block or its parts is no reason against fusing."""
    plain, fused = pair(InPlaceAdd)
    for i, module in enumerate(fused.modules()):
        module.tag = i
    assert_same_step(plain, fused)
    assert ran_as(fused, "separate")
    fused.conv1.another = 1
    assert_same_step(plain, fused)
    assert ran_as(fused, "separate")


def test_a_flag_that_hides_one_of_the_class_from_the_start():
    """As `expansion` in many blocks."""

    class Narrow(InPlaceAdd):
        expansion = 4

        def __init__(self):
            super().__init__()
            self.expansion = 1

    plain, fused = pair(Narrow)
    assert_same_step(plain, fused)
    assert ran_as(fused, "separate")


@pytest.mark.parametrize("name", ["_conv_forward", "__call__"])
def test_a_method_given_to_a_class_of_torch(name, monkeypatch):
    plain, fused = pair(InPlaceAdd)
    fused(images()), plain(images())
    original = getattr(nn.Conv2d, name)
    monkeypatch.setattr(nn.Conv2d, name, lambda self, *args: 2 * original(self, *args))
    assert_same_step(plain, fused)
    assert fusedres.report(fused).blocks[0].code == f"forward_replaced:Conv2d.{name}"


def test_a_helper_given_to_the_class(monkeypatch):
    plain, fused = pair(WithHelper)
    fused(images()), plain(images())
    monkeypatch.setattr(WithHelper, "act", lambda self, x: F.silu(x))
    assert_same_step(plain, fused)
    assert fusedres.report(fused).blocks[0].code == "forward_replaced:WithHelper.act"


def hooked(module):
    """As accelerate's `add_hook_to_module` does, and, called, `remove_hook_from_module`."""
    module._old_forward = module.forward

    def new_forward(self, *args):
        return self._old_forward(*args)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)

    def remove():
        module.forward = module._old_forward
        del module._old_forward

    return remove


@pytest.mark.parametrize("path", ["", "conv1", "bn2"])
def test_a_wrapped_forward_that_was_put_back(path):
    plain, fused = pair(InPlaceAdd)
    remove = hooked(fused.get_submodule(path))
    assert_same_step(plain, fused)
    remove()
    assert "forward" in vars(fused.get_submodule(path))
    assert_same_step(plain, fused)
    assert ran_as(fused, "separate")
    fusedres.unpatch(fused)
    assert_same_step(plain, fused)
    fusedres.patch(fused, recipe="separate", strict=True)
    assert_same_step(plain, fused)
    assert ran_as(fused, "separate")
