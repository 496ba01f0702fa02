"""Blocks whose forward enters a state of torch or asks for it, or checks its input, run as they are."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_same_float64
from spellings import InPlaceAdd
from torch import is_grad_enabled as gradients_are_on
from torch import nn

import fusedres
from fusedres.patching import ambient


class Decorated(InPlaceAdd):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x):
        return super().forward(x)


class Without(InPlaceAdd):
    """As blocks do that insist on float32."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class PartlyWithin(InPlaceAdd):
    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.conv2(out)
        return self.relu(self.bn2(out) + x)


class AllWithin(InPlaceAdd):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.float16):
            return super().forward(x)


class WithGradients(InPlaceAdd):
    def forward(self, x):
        with torch.enable_grad():
            return super().forward(x)


class OutOfInference(InPlaceAdd):
    def forward(self, x):
        with torch.inference_mode(False):
            return super().forward(x)


class Branch(InPlaceAdd):
    """Twice as much in one state."""

    def asks(self) -> bool:
        raise NotImplementedError

    def forward(self, x):
        y = super().forward(x)
        return y * 2 if self.asks() else y


class OnAutocast(Branch):
    def asks(self):
        return torch.is_autocast_enabled("cpu")


class OnAutocastDtype(Branch):
    def asks(self):
        return torch.get_autocast_dtype("cpu") is torch.float16


class OnGradMode(Branch):
    def asks(self):
        return not gradients_are_on()


class OnInference(Branch):
    def asks(self):
        return getattr(torch, "is_inference_mode_enabled")()  # noqa: B009


def default_is_double() -> bool:
    return torch.get_default_dtype() is torch.float64


class OnDefaultDtype(Branch):
    def asks(self):
        return default_is_double()


class OnDeterminism(Branch):
    def asks(self):
        return torch.are_deterministic_algorithms_enabled()


class OnBackend(Branch):
    def asks(self):
        return torch.backends.cudnn.deterministic


ENTERS = [Decorated, AllWithin, Without, PartlyWithin, WithGradients, OutOfInference]
ASKS = [OnAutocast, OnAutocastDtype, OnGradMode, OnInference, OnDefaultDtype, OnDeterminism, OnBackend]
CONTEXTS = {
    "plain": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("build", [*ENTERS, *ASKS])
@pytest.mark.filterwarnings("ignore:fusedres.patch. no residual block")
def test_the_original_runs(build):
    torch.manual_seed(0)
    plain = build()
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    code = fusedres.report(fused).blocks[0].code
    expected = "enters_state" if build in ENTERS else "asks_state"
    assert code.partition(":")[0] == ("grad_mode_dependent" if build is OutOfInference else expected), code
    x = torch.randn(3, 16, 6, 6)
    for context in CONTEXTS.values():
        with context():
            expected, found = plain(x), fused(x)
        assert found.dtype is expected.dtype and found.requires_grad == expected.requires_grad
        assert found.is_inference() == expected.is_inference()
        assert_same_float64(found.double(), expected.double(), build.__name__)


class Asking(InPlaceAdd):
    """By a name that no list holds: `object` hides it from a reading of the code."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = {"on": torch.is_autocast_enabled}

    def forward(self, x):
        y = super().forward(x)
        return y * 2 if self.ask["on"]("cpu") else y


@pytest.mark.filterwarnings("ignore:fusedres.patch. no residual block")
def test_a_question_that_only_a_run_shows():
    model = fusedres.patch(nn.Sequential(Asking()), recipe="separate")
    assert fusedres.report(model).blocks[0].code == "asks_state"


@pytest.mark.parametrize("build", [Decorated, AllWithin])
def test_verify_compares_dtype_and_layout(build, monkeypatch):
    """A patcher that sees no state of torch is caught by `verify`."""
    monkeypatch.setattr(ambient, "state", lambda: ())
    monkeypatch.setattr(ambient, "question", lambda functions: None)
    x = torch.randn(2, 16, 8, 8)
    found = fusedres.verify(nn.Sequential(build()), x, recipes="separate")
    failed = {check.what for check in found.checks if not check.passed}
    assert found.fused_blocks["separate"] == 1 and not found
    assert "training: dtype, layout, float32" in failed, failed


def test_verify_compares_layouts(monkeypatch):
    """An output that is right but for its strides."""
    from fusedres.blocks import separate

    right = separate.forward

    def in_nchw(*args):
        out = right(*args)
        return out._replace(y=out.y.contiguous())

    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(InPlaceAdd()).to(memory_format=torch.channels_last)
    assert fusedres.verify(model, x, recipes="separate")
    monkeypatch.setattr(separate, "forward", in_nchw)
    found = fusedres.verify(model, x, recipes="separate")
    assert {check.what for check in found.checks if not check.passed} == {
        f"{mode}: dtype, layout, {dtype}"
        for mode in ("training", "evaluation")
        for dtype in ("float64", "float32")
    }


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
