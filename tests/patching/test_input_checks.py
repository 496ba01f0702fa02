"""A block's own checks of its input: its errors come word for word, wherever the numbers stand that it checks for."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from spellings import InPlaceAdd, TwoConvs
from torch import nn

import fusedres

LIMITS = {"width": 1300}
elsewhere = types.ModuleType("elsewhere")
elsewhere.HIGHEST = 1400


class Options:
    largest = 1500


class Checked(TwoConvs):
    def check(self, x) -> None:
        raise NotImplementedError

    def forward(self, x):
        self.check(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class OfTheClass(Checked):
    LARGEST = 1111

    def check(self, x):
        if x.shape[2] > self.LARGEST:
            raise ValueError("too high")


class ByDefault(Checked):
    def check(self, x, largest=1200):
        if x.shape[2] > largest:
            raise ValueError("too high by default")


class InATable(Checked):
    def check(self, x):
        if x.shape[3] == LIMITS["width"]:
            raise ValueError("this width is taken")


class InAModule(Checked):
    def check(self, x):
        assert x.shape[2] <= elsewhere.HIGHEST, "higher than elsewhere"


class InOptions(Checked):
    def check(self, x):
        if x.shape[3] == Options.largest:
            raise ValueError("the largest is no size")


class InOwnTable(Checked):
    def __init__(self) -> None:
        super().__init__()
        self.limits = {"height": 333}

    def check(self, x):
        if x.shape[2] == self.limits["height"]:
            raise ValueError("not this height")


class OfTheArea(Checked):
    def check(self, x):
        if x.shape[2] * x.shape[3] > 2e6:
            raise ValueError("too many positions")


class OfBothSides(Checked):
    def check(self, x):
        if x.size()[2:] == (6, 9):
            raise ValueError("not these sides")


FAR_OFF = {
    OfTheClass: (1, 16, 1112, 1),
    ByDefault: (1, 16, 1201, 1),
    InATable: (1, 16, 1, 1300),
    InAModule: (1, 16, 1401, 1),
    InOptions: (1, 16, 1, 1500),
    InOwnTable: (1, 16, 333, 1),
    OfTheArea: (1, 16, 2000001, 1),
    OfBothSides: (1, 16, 6, 9),
}


def outcome(module, x):
    try:
        return module(x)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("build", FAR_OFF)
@pytest.mark.filterwarnings("ignore:fusedres.patch. no residual block")
def test_numbers_wherever_they_stand(build):
    plain = build()
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    x = torch.ones(FAR_OFF[build])
    expected = outcome(plain, x)
    assert isinstance(expected, tuple) and outcome(fused, x) == expected
    assert fusedres.report(fused).blocks[0].code == f"checks_input:{expected[0].__name__}"


class SmallOnly(InPlaceAdd):
    """Its own check of sizes, each by the way of a subclass."""

    def check(self, x) -> None:
        raise NotImplementedError

    def forward(self, x):
        self.check(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class EvenWidth(SmallOnly):
    def check(self, x):
        if x.shape[-1] % 2:
            raise ValueError(f"odd width {x.shape[-1]}")


class AtLeastFour(SmallOnly):
    def check(self, x):
        if min(x.size(2), x.size(3)) < 4:
            raise AssertionError("too small")


class AtMost(SmallOnly):
    def __init__(self) -> None:
        super().__init__()
        self.limit = 2000

    def check(self, x):
        if x.shape[2] > self.limit:
            raise RuntimeError("too high")


class Square(SmallOnly):
    def check(self, x):
        torch._assert(x.shape[2] == x.shape[3], "not square")


class EvenBatch(SmallOnly):
    def check(self, x):
        n, _, _, _ = x.shape
        if n not in (1, 2, 40):
            raise IndexError(f"batch of {n}")


class AreaBelow(SmallOnly):
    def check(self, x):
        if x.shape[2] * x.shape[3] > 60000:
            raise MemoryError("image too large")


class OtherAbove(SmallOnly):
    """No error, another path."""

    def forward(self, x):
        y = super().forward(x)
        return y * 2 if x.shape[2] > 1500 else y

    def check(self, x):
        return


REFUSED = {  # a shape that the block refuses, or takes another path for
    EvenWidth: (2, 16, 8, 7),
    AtLeastFour: (2, 16, 3, 9),
    AtMost: (1, 16, 2001, 1),
    Square: (2, 16, 6, 8),
    EvenBatch: (3, 16, 6, 6),
    AreaBelow: (1, 16, 60001, 1),
    OtherAbove: (1, 16, 1501, 1),
}


@pytest.mark.parametrize("recipe", ["separate", "gram"])
@pytest.mark.parametrize("build", REFUSED)
@pytest.mark.filterwarnings("ignore:fusedres.patch. no residual block")
def test_a_blocks_own_checks_of_its_input(build, recipe):
    torch.manual_seed(0)
    plain = build()
    fused = fusedres.patch(copy.deepcopy(plain), recipe=recipe)
    outcomes = []
    for model in (plain, fused):
        try:
            outcomes.append(model(torch.ones(REFUSED[build])))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    if build is OtherAbove:
        assert torch.equal(*outcomes)
        assert fusedres.report(fused).blocks[0].code == "shape_dependent"
    else:
        assert outcomes[0] == outcomes[1] and isinstance(outcomes[0], tuple)
        assert fusedres.report(fused).blocks[0].code == f"checks_input:{outcomes[0][0].__name__}"


class Halves(InPlaceAdd):
    """Takes no odd size, because torch's addition does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(16, 16, 2, 2)
        self.shortcut = nn.AvgPool2d(2, ceil_mode=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.shortcut(x))


def test_sizes_that_torch_itself_refuses_are_no_reason():
    torch.manual_seed(0)
    plain = Halves()
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate", strict=True)
    for model in (plain, fused):
        with pytest.raises(RuntimeError, match="must match the size"):
            model(torch.ones(2, 16, 7, 7))
    fused(torch.ones(2, 16, 8, 8))
    assert fusedres.report(fused).blocks[0].runs_as == "separate"
