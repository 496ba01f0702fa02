"""Hooks of every kind see on a patched block what they see on an unpatched one, and what they return takes effect."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_same_float64
from block_forms import ran_as
from same_model import assert_same_step, images, pair
from spellings import FunctionalReLU
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves

import fusedres

SCALE = 1.5  # what a hook that changes something multiplies by


def scaled(value):
    return (
        tuple(None if v is None else v * SCALE for v in value) if isinstance(value, tuple) else value * SCALE
    )


# kind -> (method that registers it on a module, what the hook returns from its arguments)
KINDS = {
    "forward_pre": ("register_forward_pre_hook", {}, lambda module, args: scaled(args)),
    "forward_pre_kwargs": (
        "register_forward_pre_hook",
        {"with_kwargs": True},
        lambda module, args, kwargs: (scaled(args), kwargs),
    ),
    "forward": ("register_forward_hook", {}, lambda module, args, output: scaled(output)),
    "forward_kwargs": (
        "register_forward_hook",
        {"with_kwargs": True},
        lambda module, args, kwargs, output: scaled(output),
    ),
    "forward_always": (
        "register_forward_hook",
        {"always_call": True},
        lambda module, args, output: scaled(output),
    ),
    "full_backward": ("register_full_backward_hook", {}, lambda module, dx, dy: scaled(dx)),
    "full_backward_pre": ("register_full_backward_pre_hook", {}, lambda module, dy: scaled(dy)),
    "backward": ("register_backward_hook", {}, lambda module, dx, dy: None),
}
GLOBAL = {
    "forward_pre": (torch_module.register_module_forward_pre_hook, KINDS["forward_pre"][2]),
    "forward": (torch_module.register_module_forward_hook, KINDS["forward"][2]),
    "full_backward": (torch_module.register_module_full_backward_hook, KINDS["full_backward"][2]),
    "full_backward_pre": (torch_module.register_module_full_backward_pre_hook, KINDS["full_backward_pre"][2]),
}


def recording(result, log: list):
    """A hook that notes its module's class and every tensor it was given, and returns what `result` makes of them."""

    def hook(module, *args):
        log.append(
            (type(module).__name__, [t.detach().clone() for t in tree_leaves(args) if isinstance(t, Tensor)])
        )
        return result(module, *args)

    return hook


def assert_same_log(plain: list, fused: list) -> None:
    assert plain and [name for name, _ in plain] == [name for name, _ in fused]
    for (name, expected), (_, actual) in zip(plain, fused, strict=True):
        for exact, found in zip(expected, actual, strict=True):
            assert_same_float64(found, exact, name)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["", "conv1", "bn2"], ids=["block", "convolution", "norm"])
@pytest.mark.parametrize("late", [True, False], ids=["late", "before-patch"])
def test_hook_on_a_module(kind, target, late):
    method, options, result = KINDS[kind]
    plain, fused = pair(FunctionalReLU)
    logs = [], []
    for module, log in zip((plain, fused), logs, strict=True):
        if not late:
            fusedres.unpatch(module)
        getattr(module.get_submodule(target), method)(recording(result, log), **options)
    if not late:
        fusedres.patch(fused, recipe="separate", strict=True)
    assert_same_step(plain, fused)
    assert_same_log(*logs)
    assert ran_as(fused, "separate" if target == "" and kind != "backward" else "unfused")


@pytest.mark.parametrize("kind", GLOBAL)
def test_hook_on_every_module(kind):
    register, result = GLOBAL[kind]
    plain, fused = pair(FunctionalReLU)
    logs = [], []
    for module, log in zip((plain, fused), logs, strict=True):
        handle = register(recording(result, log))
        try:
            module(images().requires_grad_()).square().sum().backward()
        finally:
            handle.remove()
    assert_same_log(*logs)
    assert ran_as(fused, "unfused")


def test_a_hook_that_is_removed_leaves_no_trace():
    plain, fused = pair()
    for module in ("", "conv1", "bn2"):
        fused.get_submodule(module).register_full_backward_hook(lambda *args: None).remove()
        fused.get_submodule(module).register_forward_hook(lambda *args: None).remove()
    assert_same_step(plain, fused)
    assert ran_as(fused, "separate")


def test_hooks_on_tensors_and_parameters():
    plain, fused = pair()
    logs = [], []
    for module, log in zip((plain, fused), logs, strict=True):
        x = images().requires_grad_()
        y = module(x)
        y.retain_grad()
        for name, t in {"x": x, "y": y, **dict(module.named_parameters())}.items():
            t.register_hook(
                lambda grad, name=name, log=log: log.append((name, [grad.clone()])) or grad * SCALE
            )
        module.conv1.weight.register_post_accumulate_grad_hook(
            lambda p, log=log: log.append(("post", [p.grad]))
        )
        y.square().sum().backward()
        log += [("x.grad", [x.grad]), ("y.grad", [y.grad])]
        log.sort(key=lambda entry: entry[0])
    assert_same_log(*logs)
    assert ran_as(fused, "separate")


def test_hooks_on_saved_tensors():
    _, fused = pair()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        y = fused(images().requires_grad_())
    y.sum().backward()
    assert any(t is fused.conv1.weight for t in packed)
    assert ran_as(fused, "separate")
