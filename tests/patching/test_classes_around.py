"""What code around a patched block sees of its class, and what it may do to it."""

from __future__ import annotations

import abc
import copy

import pytest
import torch
from same_model import assert_same_step, images, pair
from spellings import InPlaceAdd
from torch import nn

import fusedres


class Counting(type):
    """Counts the classes that it orders, and lets nobody set an attribute."""

    ordered = 0

    def mro(cls):
        Counting.ordered += 1
        return super().mro()

    def __setattr__(cls, name, value):
        raise AttributeError("frozen")


class Frozen(InPlaceAdd, metaclass=Counting):
    pass


def test_a_metaclass_with_an_order_and_a_setter_of_its_own():
    before = Counting.ordered
    plain, fused = pair(Frozen)
    assert_same_step(plain, fused)
    assert Counting.ordered == before and type(fusedres.unpatch(fused)) is Frozen


def test_attributes_set_on_the_class_reach_the_base():
    class Block(InPlaceAdd):
        width = 1

    plain, fused = pair(Block)
    type(fused).width = 2
    type(fused).forward = lambda self, x: 3 * x
    assert Block.width == 2
    for module in (plain, fused, fusedres.unpatch(fused)):
        assert torch.equal(module(images()), 3 * images())
    fused = fusedres.patch(nn.Sequential(InPlaceAdd(), fused), recipe="separate")[1]
    del type(fused).width
    assert not hasattr(Block, "width")


def test_a_class_statement_beside_an_abstract_class():
    fused = pair(InPlaceAdd)[1]
    for bases in ((abc.ABC, type(fused)), (type(fused), abc.ABC)):
        made = abc.ABCMeta("Made", bases, {})
        assert InPlaceAdd in made.__mro__ and isinstance(made(), InPlaceAdd)

    class Beside(type(fused), abc.ABC):
        pass

    assert Beside.__bases__ == (InPlaceAdd, abc.ABC)
    assert type(fused).__bases__ == InPlaceAdd.__bases__ and type(fused).__base__ is InPlaceAdd.__base__


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = InPlaceAdd()


class AsksTypeOfBlock(Around):
    def forward(self, x):
        return 2 * self.block(x) if type(self.block) is InPlaceAdd else self.block(x)


class SkipsOtherTypes(Around):
    def __init__(self) -> None:
        super().__init__()
        self.other = InPlaceAdd()

    def forward(self, x):
        for module in self.children():
            if type(module) is not InPlaceAdd:
                continue
            x = module(x)
        return x


class AsksForAnother(Around):
    """As code does that takes tuples too."""

    def forward(self, x):
        return self.block(x[0] if type(x) is tuple else x)


@pytest.mark.parametrize(
    ("build", "fuses"), [(AsksTypeOfBlock, False), (SkipsOtherTypes, False), (AsksForAnother, True)]
)
@pytest.mark.filterwarnings("ignore:fusedres.patch. no residual block")
def test_modules_around_that_ask_for_the_type(build, fuses):
    plain = build().double()
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    assert_same_step(plain, fused)
    assert fusedres.report(fused).blocks[0].code == (None if fuses else "asks_own_class")
