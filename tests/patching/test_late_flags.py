"""Flags that are not the block's own, changed after patching: of its class, of torch's classes, of objects."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_same_float64
from block_forms import ran_as
from same_model import assert_change_is_seen, assert_same_step, images, pair
from spellings import OptionsInObjects, TwoConvs
from torch import nn

import fusedres
from fusedres.models import resnet18


class WithFlag(TwoConvs):
    add = True

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + x) if self.add else F.relu(out)


def test_a_flag_of_the_class(monkeypatch):
    plain, fused = pair(WithFlag)
    monkeypatch.setattr(WithFlag, "add", False)
    assert_same_step(plain, fused)
    assert fusedres.report(fused).blocks[0].code == "attribute_changed:add"


def test_a_flag_of_the_class_hidden_by_one_of_the_instance():
    assert_change_is_seen(lambda block: setattr(block, "add", False), build=WithFlag, runs_as="unfused")


@pytest.mark.parametrize("nested", [False, True], ids=["attribute", "nested"])
def test_an_option_of_an_object(nested):
    plain, fused = pair(OptionsInObjects)
    fused(images()), plain(images())
    assert ran_as(fused, "separate")
    for block in (plain, fused):
        if nested:
            block.options.nested["layers"][0] = 1
        else:
            block.options.add = False
    assert_same_step(plain, fused)
    assert fusedres.report(fused).blocks[0].code == "attribute_changed:options"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_an_option_of_an_object_of_a_copy(duplicate):
    plain, fused = pair(OptionsInObjects)
    twin = duplicate(fused)
    assert_same_step(copy.deepcopy(plain), twin)
    assert ran_as(twin, "separate")
    plain.options.add = twin.options.add = False
    assert torch.equal(twin(images()), plain(images()))
    fused(images())
    assert ran_as(fused, "separate") and ran_as(twin, "unfused")


def test_a_forward_given_to_a_class_of_torch(monkeypatch):
    plain, fused = pair()
    right = nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: 2 * right(self, x))
    assert_same_step(plain, fused)
    assert fusedres.report(fused).blocks[0].code == "forward_replaced:BatchNorm2d.forward"


def test_a_forward_given_to_a_class_of_torch_is_seen_by_a_stem(monkeypatch):
    plain, fused = pair(lambda: resnet18(num_classes=3))
    right = nn.MaxPool2d.forward
    monkeypatch.setattr(nn.MaxPool2d, "forward", lambda self, x: 2 * right(self, x))
    assert_same_float64(fused(images(2, 3, 32, 32)), plain(images(2, 3, 32, 32)))
    assert fusedres.report(fused).blocks[0].code == "forward_replaced:MaxPool2d.forward"


@pytest.mark.parametrize("change", ["class", "instance", "object", "forward"])
def test_a_compiled_block_is_traced_anew(change, monkeypatch):
    torch.compiler.reset()
    plain, fused = pair(OptionsInObjects if change == "object" else WithFlag)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same_float64(compiled(images()), plain(images()))
    if change == "class":
        monkeypatch.setattr(WithFlag, "add", False)
    elif change == "forward":
        right = nn.BatchNorm2d.forward
        monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: right(self, x + 1) * 2)
    else:
        for block in (plain, fused):
            setattr(*(block.options, "add") if change == "object" else (block, "add"), False)
    assert_same_float64(compiled(images()), plain(images()))
