"""Blocks whose forward enters a state of torch or asks for it, or checks its input, run as they are."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.backends.cudnn as cudnn
from accuracy import assert_same_float64
from spellings import InPlaceAdd
from torch import is_grad_enabled as gradients_are_on
from torch import nn
from torch.backends.cuda import matmul

import fusedres
from fusedres.matching import ambient


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


class Policy:
    def on(self) -> bool:
        return torch.are_deterministic_algorithms_enabled()


POLICY = Policy()


class OnPolicy(Branch):
    """Through an object."""

    def asks(self):
        return POLICY.on()


class OnDefault(Branch):
    def asks(self, ask=torch.are_deterministic_algorithms_enabled):
        return ask()


class OnCudnn(Branch):
    """By the name that training scripts give it."""

    def asks(self):
        return cudnn.deterministic


class OnMatmul(Branch):
    def asks(self):
        return matmul.allow_tf32 is None


class OnAnomaly(Branch):
    def asks(self):
        return torch.is_anomaly_enabled()


class OnInternals(Branch):
    def asks(self):
        return torch._C._get_deterministic_algorithms()


ENTERS = [Decorated, AllWithin, Without, PartlyWithin, WithGradients, OutOfInference]
ASKS = [OnAutocast, OnAutocastDtype, OnGradMode, OnInference, OnDefaultDtype, OnDeterminism, OnBackend]
ASKS += [OnPolicy, OnDefault, OnCudnn, OnMatmul, OnAnomaly, OnInternals]


@contextmanager
def deterministic():
    """In all ways, and without torch's warning about the price of detecting anomalies."""
    torch.use_deterministic_algorithms(True)
    before, cudnn.deterministic = cudnn.deterministic, True
    try:
        yield
    finally:
        cudnn.deterministic = before
        torch.use_deterministic_algorithms(False)


CONTEXTS = {
    "plain": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": deterministic,
}


@pytest.mark.parametrize("build", [*ENTERS, *ASKS])
@pytest.mark.filterwarnings("ignore:fusedres.patch. no residual block")
def test_the_original_runs(build):
    torch.manual_seed(0)
    plain = build()
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    code = fusedres.report(fused).blocks[0].code
    expected = "enters_state" if build in ENTERS else "asks_state"
    assert code.partition(":")[0] == expected, code
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
