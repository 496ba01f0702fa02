"""Nothing that eager accepts raises when patched, and the result is the same; whatever eager rejects raises."""

from __future__ import annotations

import copy
import itertools
from functools import cache

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from block_forms import randomize
from torch import Tensor, nn

import fusedres
from fusedres.models import Bottleneck


class Subclass(Tensor):
    pass


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (2, 16, 6, 6)), generator=torch.Generator().manual_seed(seed))


def negated(t: Tensor) -> Tensor:
    """t as a view with the negative bit set, whose memory holds -t."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


INPUTS = {
    "plain": lambda: x(),
    "no_argument": lambda: (),
    "two_arguments": lambda: (x(), x()),
    "none": lambda: None,
    "list": lambda: x().tolist(),
    "rank_0": lambda: x()[0, 0, 0, 0],
    "rank_2": lambda: x(2, 16),
    "rank_3": lambda: x(16, 6, 6),
    "rank_5": lambda: x(2, 16, 6, 6, 6),
    "fewer_channels": lambda: x(2, 8, 6, 6),
    "more_channels": lambda: x(2, 32, 6, 6),
    "no_channels": lambda: x(2, 0, 6, 6),
    "no_images": lambda: x(0, 16, 6, 6),
    "no_rows": lambda: x(2, 16, 0, 6),
    "one_value": lambda: x(1, 16, 1, 1),
    "one_pixel": lambda: x(3, 16, 1, 1),
    "one_row": lambda: x(1, 16, 1, 7),
    "float64": lambda: x().double(),
    "bfloat16": lambda: x().bfloat16(),
    "float16": lambda: x().half(),
    "int64": lambda: x().long(),
    "bool": lambda: x() > 0,
    "complex64": lambda: x().to(torch.complex64),
    "meta": lambda: x().to("meta"),
    "sparse": lambda: x().to_sparse(),
    "channels_last": lambda: x().to(memory_format=torch.channels_last),
    "slice": lambda: x(3, 20, 9, 6)[1:, 2:18, 1:7],
    "slice_channels_last": lambda: x(2, 24, 6, 6).to(memory_format=torch.channels_last)[:, 4:20],
    "strided": lambda: x(2, 16, 12, 12)[:, :, ::2, ::2],
    "transposed": lambda: x().transpose(2, 3),
    "expanded": lambda: x(1, 16, 6, 6).expand(2, -1, -1, -1),
    "offset": lambda: torch.cat([x(1), x().flatten()])[1:].view(2, 16, 6, 6),
    "negative_bit": lambda: negated(x()),
    "parameter": lambda: nn.Parameter(x()),
    "subclass": lambda: x().as_subclass(Subclass),
    "nan": lambda: x().index_fill(1, torch.tensor([3]), float("nan")),
}


def narrow(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.detach()[:3].clone())


def replace(path: str, change):
    """Replaces a parameter or buffer, past the checks of `setattr`, by what `change` makes of it."""
    head, _, name = path.rpartition(".")

    def apply(block):
        module = block.get_submodule(head)
        kept = module._parameters if name in module._parameters else module._buffers
        kept[name] = change(kept[name])

    return apply


def write(path: str, value):
    head, _, name = path.rpartition(".")
    return lambda block: setattr(block.get_submodule(head), name, value)


CHANGES = {
    "nothing": lambda block: None,
    "short_bn_weight": replace("bn1.weight", narrow),
    "one_bn_weight": replace("bn1.weight", lambda t: nn.Parameter(t.detach()[:1].clone())),
    "short_bn_bias": replace("bn3.bias", narrow),
    "short_running_mean": replace("bn2.running_mean", lambda t: t[:3].clone()),
    "no_running_var": replace("bn2.running_var", lambda t: None),
    "no_running_mean": replace("bn2.running_mean", lambda t: None),
    "no_statistics": lambda b: [
        replace(f"bn2.{k}", lambda t: None)(b) for k in ("running_mean", "running_var")
    ],
    "no_counter": replace("bn2.num_batches_tracked", lambda t: None),
    "no_bn_weight": replace("bn1.weight", lambda t: None),
    "no_bn_bias": replace("bn1.bias", lambda t: None),
    "no_weight": replace("conv2.weight", lambda t: None),
    "flat_weight": replace("conv2.weight", lambda t: nn.Parameter(t.detach()[0])),
    "weight_of_other_channels": replace("conv2.weight", lambda t: nn.Parameter(t.detach()[:, :2].clone())),
    "weight_of_fewer_outputs": replace("conv2.weight", lambda t: nn.Parameter(t.detach()[:2].clone())),
    "meta_weight": replace("conv1.weight", lambda t: nn.Parameter(t.detach().to("meta"))),
    "meta_bn_bias": replace("bn3.bias", lambda t: nn.Parameter(t.detach().to("meta"))),
    "double_weight": replace("conv1.weight", lambda t: nn.Parameter(t.detach().double())),
    "double_bn": lambda block: block.bn1.double(),
    "bfloat16_bn": lambda block: block.bn1.bfloat16(),
    "double_statistics": replace("bn1.running_mean", lambda t: t.double()),
    "channels_last_weight": lambda block: block.to(memory_format=torch.channels_last),
    "conv_bias": lambda block: write("conv2.bias", nn.Parameter(torch.linspace(-1, 1, 4)))(block),
    "short_conv_bias": write("conv2.bias", nn.Parameter(torch.ones(3))),
    "negative_padding": write("conv2.padding", (-1, -1)),
    "padding_same": write("conv2.padding", "same"),
    "padding_as_number": write("conv2.padding", 1),
    "padding_of_one": write("conv2.padding", (1,)),
    "padding_oblong": write("conv2.padding", (1, 0)),
    "padding_mode": lambda b: [setattr(b.conv2, "padding_mode", "circular")],
    "stride_0": write("conv2.stride", (0, 0)),
    "stride_as_list": write("conv2.stride", [1, 1]),
    "stride_2": write("conv2.stride", (2, 2)),
    "dilation_as_number": lambda b: [write("conv2.dilation", 2)(b), write("conv2.padding", 2)(b)],
    "dilation_too_large": write("conv2.dilation", (9, 9)),
    "groups": write("conv2.groups", 3),
    "momentum_none": write("bn1.momentum", None),
    "momentum_0": write("bn1.momentum", 0.0),
    "untracked": write("bn1.track_running_stats", False),
    "norm_eval": lambda block: block.bn2.eval(),
    "one_norm_twice": lambda block: setattr(block, "bn2", block.bn1),
    "one_conv_twice": lambda block: setattr(block.conv2, "weight", block.conv2.weight),
}


@cache
def built(recipe: str) -> nn.Module:
    """One patched block; the tests change copies of it."""
    return fusedres.patch(randomize(Bottleneck(16, 4)), recipe=recipe)


def pair(recipe: str, dtype: torch.dtype, training: bool) -> tuple[nn.Module, nn.Module]:
    """An unpatched and a patched block."""
    fused = copy.deepcopy(built(recipe)).to(dtype).train(training)
    return fusedres.unpatch(copy.deepcopy(fused)), fused


def outcome(block: nn.Module, given: object, autocast: bool) -> Tensor | Exception:
    args = given if isinstance(given, tuple) else (given,)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(*args)
        if y.requires_grad:
            y.backward(torch.ones_like(y))
        return y.detach()
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        return error


def assert_same_outcome(plain: nn.Module, fused: nn.Module, make, autocast: bool, what: str) -> None:
    exact_block = copy.deepcopy(plain)
    eager, actual = outcome(plain, make(), autocast), outcome(fused, make(), autocast)
    if isinstance(eager, Exception):
        assert isinstance(actual, Exception), f"{what}: eager raises {eager!r}, patched does not"
        return
    assert isinstance(actual, Tensor), f"{what}: eager accepts it, patched raises {actual!r}"
    assert (actual.shape, actual.dtype, actual.device) == (eager.shape, eager.dtype, eager.device), what
    assert actual.stride() == eager.stride() or 1 in eager.shape, (
        f"{what}: {actual.stride()}, {eager.stride()}"
    )
    if eager.numel() and eager.device.type == "cpu" and eager.is_floating_point():
        given = make()
        exact = exact_block.double()(given.double() if type(given) is Tensor else given.data.double())
        assert_as_accurate_as_eager(actual.as_subclass(Tensor), eager.as_subclass(Tensor), exact, what)
        for (name, e), a in zip(plain.named_buffers(), fused.buffers(), strict=True):
            exact = dict(exact_block.named_buffers())[name]
            if e.is_floating_point():
                assert_as_accurate_as_eager(a, e, exact, f"{what}: {name}")
            else:
                assert torch.equal(a, e), f"{what}: {name}"


RECIPES = ("separate", "gram")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", INPUTS)
def test_every_input(name, recipe):
    for dtype, training, autocast in itertools.product(
        (torch.float32, torch.bfloat16), (True, False), (False, True)
    ):
        plain, fused = pair(recipe, dtype, training)
        what = f"{name}, {dtype}, training {training}, autocast {autocast}"
        assert_same_outcome(plain, fused, INPUTS[name], autocast, what)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", CHANGES)
def test_every_change_made_after_patching(name, recipe):
    for training, autocast in itertools.product((True, False), (False, True)):
        plain, fused = pair(recipe, torch.float32, training)
        for block in (plain, fused):
            CHANGES[name](block)
        for given in ("plain", "channels_last"):
            what = f"{name}, {given}, training {training}, autocast {autocast}"
            assert_same_outcome(plain, fused, INPUTS[given], autocast, what)
