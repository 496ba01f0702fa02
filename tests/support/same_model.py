"""A patched model is the same model: everything one training step shows, held against the unpatched twin's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from accuracy import assert_same_float64
from block_forms import Step, ran_as, randomize
from spellings import InPlaceAdd
from torch import Tensor, nn

import fusedres

Change = Callable[[nn.Module], object]


def pair(
    build: Callable[[], nn.Module] = InPlaceAdd, recipe: str = "separate"
) -> tuple[nn.Module, nn.Module]:
    """An unpatched block in float64, and its patched copy."""
    plain = randomize(build()).double()
    return plain, fusedres.patch(copy.deepcopy(plain), recipe=recipe, strict=True)


def images(*shape: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (3, 16, 6, 6)), dtype=torch.float64, generator=generator)


def step(module: nn.Module, x: Tensor) -> Step:
    """One forward, and the backward of a fixed gradient."""
    module.zero_grad(set_to_none=True)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    y.backward(images(*y.shape, seed=6) + 1)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return Step(y.detach(), x.grad, gradients, dict(module.named_buffers()))


def assert_same_step(plain: nn.Module, other: nn.Module, x: Tensor | None = None) -> None:
    """One forward and backward in float64: outputs, gradients and buffers agree, None where the twin has None."""
    x = images() if x is None else x
    expected, actual = (step(module, x) for module in (plain, other))
    assert_same_float64(actual.y, expected.y, "y")
    assert_same_float64(actual.dx, expected.dx, "dx")
    assert expected.gradients.keys() == actual.gradients.keys()
    for name, exact in expected.gradients.items():
        if exact is None:
            assert actual.gradients[name] is None, name
        else:
            assert_same_float64(actual.gradients[name], exact, name)
    assert_same_buffers(plain, other)


def assert_same_buffers(plain: nn.Module, other: nn.Module) -> None:
    for (name, exact), (found, actual) in zip(plain.named_buffers(), other.named_buffers(), strict=True):
        assert name == found
        if exact.is_floating_point():
            assert_same_float64(actual, exact, name)
        else:
            assert torch.equal(actual, exact), name


def assert_change_is_seen(
    change: Change, recipe: str = "separate", build: Callable[[], nn.Module] = InPlaceAdd, runs_as: str = ""
) -> None:
    """The same change made to an unpatched and a patched block gives the same block, which it was not before.

    runs_as: what the patched one must run as afterwards; by default the recipe.
    """
    plain, fused = pair(build, recipe)
    before = copy.deepcopy(plain)
    fused(images())  # anything kept from an earlier call would be kept here
    plain(images())
    assert ran_as(fused, recipe)
    change(plain), change(fused)
    assert_same_step(plain, fused)
    assert ran_as(fused, runs_as or recipe)
    old, new = step(before, images()), step(plain, images())
    assert old.y.shape != new.y.shape or not torch.equal(old.y, new.y), "the change changes nothing"
