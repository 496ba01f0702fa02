"""Under FakeTensorMode a patched model gives what an unpatched one gives: fake tensors of the same form."""

from __future__ import annotations

import contextlib

import pytest
import torch
from asked_gradients import net
from same_model import images, pair
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fusedres

PARTS = {"stem": (0, 3), "identity": (1, 64), "pooled": (2, 64), "projection": (3, 32), "all": (slice(4), 3)}


def form(t):
    """All that a fake tensor has."""
    return type(t), tuple(map(str, t.shape)), tuple(map(str, t.stride())), t.dtype, t.device, t.requires_grad


def same_forms(call, plain, fused):
    """The form of each tensor of `call` of both models, which must agree; returned."""
    expected, actual = ([form(t) for t in call(model)] for model in (plain, fused))
    assert actual == expected
    return actual


@pytest.mark.parametrize(
    ("part", "recipe"),
    [("all", "auto"), *((part, "separate") for part in PARTS), ("identity", "gram"), ("projection", "gram")],
)
@pytest.mark.parametrize("real", [True, False], ids=["real", "fake"])
def test_a_real_model(part, recipe, real):
    index, channels = PARTS[part]
    x = images(2, channels, 8, 8).to(memory_format=torch.channels_last)
    models = pair(lambda: nn.Sequential(*net())[index], recipe)
    for training, gradients in ((True, True), (False, True), (False, False)):

        def call(model, training=training, gradients=gradients):
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.set_grad_enabled(gradients):
                return [model.train(training)(x if real else mode.from_tensor(x))]

        ((kind, *_),) = same_forms(call, *models)
        assert kind is FakeTensor
    codes = {row.code and row.code.partition(":")[0] for row in fusedres.report(models[1]).matched}
    assert codes <= {"too_small", "native_missing", "fake_mode", "tensor_subclass"}


@pytest.mark.parametrize("recipe", ["separate", "gram"])
@pytest.mark.parametrize("when", ["forward", "backward"], ids=["from-forward", "backward-alone"])
def test_backward(recipe, when):
    """Also of a graph that was made from real tensors, by our own kernels."""

    def call(model):
        x = images(2, 3, 8, 8).requires_grad_()
        with FakeTensorMode(allow_non_fake_inputs=True):
            outside = torch.utils._python_dispatch._disable_current_modes
            with outside() if when == "backward" else contextlib.nullcontext():
                y = model(x)
            return torch.autograd.grad(y, [x, *model.parameters()], torch.ones(y.shape, dtype=y.dtype))

    assert all(kind is FakeTensor for kind, *_ in same_forms(call, *pair(net, recipe)))


@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_symbolic_sizes(recipe):
    def call(model):
        with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
            return [model(mode.from_tensor(x))]

    x = images(2, 64, 8, 8)
    ((_, shape, *_),) = same_forms(call, *pair(lambda: net()[1], recipe))
    assert any("s" in size for size in shape)


@pytest.mark.parametrize("inside", [True, False], ids=["patched-inside", "patched-outside"])
def test_a_model_made_of_fake_tensors(inside):
    mode = FakeTensorMode()

    def call(model):
        with mode:
            return [model(torch.randn(2, 3, 8, 8))]

    with mode:
        plain, fused = net(), net()
    with mode if inside else contextlib.nullcontext():
        fusedres.patch(fused, recipe="separate", strict=True)
    same_forms(call, plain, fused)


@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_a_compiled_model(recipe):
    def call(model):
        torch._dynamo.reset()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return [torch.compile(model, backend="aot_eager")(mode.from_tensor(x))]

    x = images(2, 64, 8, 8)
    same_forms(call, *pair(lambda: net()[1], recipe))
    torch._dynamo.reset()
