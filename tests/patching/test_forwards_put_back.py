"""Forwards that a tool wrapped and put back, as accelerate does, which leaves the class's own on the instance."""

from __future__ import annotations

import copy
import functools

import pytest
from block_forms import ran_as
from same_model import assert_same_step, images, pair
from spellings import InPlaceAdd
from test_instance_attributes import hooked
from torch import nn

import fusedres
from fusedres.models import resnet18

ORDERS = [
    "hook, unhook, patch",
    "hook, patch, unhook, patch",
    "patch, hook, unhook, patch",
    "patch, hook, patch, unhook",
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.filterwarnings("ignore:fusedres.patch. no residual block")
def test_every_forward_of_a_model_wrapped_and_put_back(order):
    """In any order with patching; where a hook is there when the model is patched, it is patched again."""
    plain, fused = pair(InPlaceAdd)
    fused = fusedres.unpatch(nn.Sequential(fused))
    for action in order.split(", "):
        if action == "patch":
            fusedres.patch(fused, recipe="separate")
        elif action == "hook":
            removes = [hooked(module) for module in fused.modules()]
        else:
            [remove() for remove in removes]
    fusedres.patch(fused, recipe="separate", strict=True)
    assert_same_step(plain, fused[0])
    assert ran_as(fused, "separate")
    assert_same_step(plain, copy.deepcopy(fusedres.unpatch(fused)[0]))


def test_a_forward_of_the_model_that_was_put_back():
    """As accelerate leaves it: the stem is patched again."""
    model = resnet18(num_classes=3)
    before = model.forward
    model.forward = functools.partial(lambda self, x: before(x), model)
    fusedres.patch(model, recipe="separate")
    assert fusedres.report(model).blocks[0].code == "instance_forward"
    model.forward = before
    fusedres.patch(model, recipe="separate")
    model.eval()(images(1, 3, 32, 32).float())
    assert fusedres.report(model).blocks[0].runs_as == "separate"
