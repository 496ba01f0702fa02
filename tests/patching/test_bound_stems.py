"""A stem's call is bound as a block's is, while the parts that a model's method calls are the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from bound_calls import WARM, assert_same_step, autocast, step
from library_models import TimmResNet, TorchvisionResNet
from torch import Tensor, nn

import fusedres
from fusedres.models import resnet18
from fusedres.modules.derived_class import STATE
from fusedres.ops.native import library
from fusedres.patching import bound
from fusedres.recording import replays

pytestmark = pytest.mark.skipif(not library.is_loaded(), reason="the compiled kernels are not built")


class Stem(nn.Module):
    """All of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        self.act, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool(self.act(self.bn1(self.conv1(x))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": TorchvisionResNet,
    "timm": TimmResNet,
    "ours": lambda: resnet18(num_classes=5),
    "a module": Stem,
}


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(replays, "DEVICES", {"cpu"})
    replays.forget()
    yield
    replays.forget()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a stem that could be bound, whether it was."""
    found: list[bool] = []
    y = bound.Bound.y

    def noted(self: bound.Bound, module: nn.Module, *args: object) -> Tensor | None:
        result = y(self, module, *args)  # type: ignore[arg-type]
        if hasattr(module, "maxpool"):
            found.append(result is not None)
        return result

    monkeypatch.setattr(bound.Bound, "y", noted)
    return found


LAYOUTS = torch.contiguous_format, torch.channels_last


def photos(layout: torch.memory_format = LAYOUTS[0], seed: int = 5) -> Tensor:
    """As a loader gives them, [2, 3, 33, 33]."""
    x = torch.randn(2, 3, 33, 33, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=layout)


def bound_models(
    name: str = "torchvision", layout: torch.memory_format = LAYOUTS[0]
) -> tuple[nn.Module, nn.Module]:
    """Two patched models, the first to be run by Python; the second one's stem is bound."""
    torch.manual_seed(0)
    plain = MODELS[name]().to(memory_format=torch.channels_last)
    by_python, patched = (fusedres.patch(copy.deepcopy(plain), recipe="separate") for _ in range(2))
    for _ in range(WARM):
        assert_same_step(by_python, patched, photos(layout), wants_dx=False)
    assert patched.__dict__[STATE].bound
    return by_python, patched


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_stem_is_bound(name: str, layout: torch.memory_format, served: list[bool]) -> None:
    """Its images are cast, and brought into the layout of its weight."""
    by_python, patched = bound_models(name, layout)
    served.clear()
    for seed in range(2):
        assert_same_step(by_python, patched, photos(layout, seed), wants_dx=False)
    assert served == [True] * 2 and patched.__dict__[STATE].runs_as == "separate"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_that_want_a_gradient_keep_their_layout(
    layout: torch.memory_format, served: list[bool]
) -> None:
    """In turn with images that want none."""
    by_python, patched = bound_models(layout=layout)
    for wants_dx in (True, False) * WARM:
        assert_same_step(by_python, patched, photos(layout), wants_dx)
    assert served[-1]


def test_images_of_inference_mode_are_refused_as_torch_refuses_them(served: list[bool]) -> None:
    """Under autocast images in its dtype reach the convolution as they are."""
    model = TorchvisionResNet().to(memory_format=torch.channels_last)
    patched = fusedres.patch(copy.deepcopy(model), recipe="separate")
    with torch.inference_mode():
        made = photos().bfloat16()
    for each in (model, *[patched] * 2):
        with autocast(), pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            each(made)
    for _ in range(WARM):
        step(patched, photos().bfloat16(), wants_dx=False)
    assert served[-1]
    with autocast(), pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        patched(made)
    with autocast(), torch.no_grad():
        assert patched(made).isfinite().all()


def hides(model: nn.Module) -> None:
    """An attribute of the model that its method finds before the module."""
    model.__dict__["relu"] = torch.sigmoid


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "pool": lambda m: setattr(m.maxpool, "kernel_size", 2) or setattr(m.maxpool, "padding", 0),
    "ceil": lambda m: setattr(m.maxpool, "ceil_mode", True),
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "weight's layout": lambda m: m.to(memory_format=torch.contiguous_format),
    "a hook": lambda m: m.bn1.register_forward_hook(lambda mod, x, y: y * 2),
    "another module": lambda m: setattr(m, "bn1", nn.BatchNorm2d(32)),
    "another activation": lambda m: setattr(m, "relu", nn.Sigmoid()),
    "another method": lambda m: setattr(m, "_forward_impl", lambda x: type(m)._forward_impl(m, x) * 2),
    "an attribute before a module": hides,
    "another class": lambda m: setattr(m.conv1, "__class__", type("Other", (nn.Conv2d,), {})),
    "in evaluation": lambda m: m.bn1.eval(),
    "frozen": lambda m: m.bn1.requires_grad_(False) and m.conv1.requires_grad_(False),
    "a sign": lambda m: setattr(m.bn1.bias, "data", torch._neg_view(m.bn1.bias.data)),
    "values": lambda m: m.conv1.weight.data.mul_(2),
}


HARMLESS = {"values", "another method"}  # which comes to the stem's in the end


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_two_bound_calls_counts(name: str, served: list[bool]) -> None:
    by_python, patched = bound_models()
    served.clear()
    for model in (by_python, patched):
        CHANGES[name](model)
    assert_same_step(by_python, patched, photos(), wants_dx=False)
    assert served in ([name in HARMLESS], [])
    assert patched.__dict__[STATE].reason == by_python.__dict__[STATE].reason
    for _ in range(2):
        assert_same_step(by_python, patched, photos(), wants_dx=False)


def test_what_goes_on_behind_a_bound_stem_is_the_models_own(served: list[bool]) -> None:
    """Its attributes may be others in every call."""
    by_python, patched = bound_models()
    served.clear()
    for model in (by_python, patched):
        model.fc = nn.Linear(32, 2)
        nn.init.ones_(model.fc.weight), nn.init.zeros_(model.fc.bias)
        model.note = "more"
    assert_same_step(by_python, patched, photos(), wants_dx=False)
    assert served == [True]
