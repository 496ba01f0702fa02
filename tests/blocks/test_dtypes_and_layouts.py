"""Autocast, half-precision weights and memory formats: what comes out is what the unpatched block gives."""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from block_forms import basic, bottleneck, each_bn, patched, projected, ran_as
from spellings import MATCHED
from torch import nn

import fusedres

BLOCKS = {"basic": (basic(), 16), "bottleneck": (bottleneck(), 32), "projection": (projected(), 16)}
HALVES = [torch.bfloat16, torch.float16]
each_block = pytest.mark.parametrize("name", BLOCKS)
each_half = pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])


def exact_twin(block: nn.Module) -> nn.Module:
    return copy.deepcopy(block).double()


def assert_same_types(
    plain: nn.Module, fused: nn.Module, x: torch.Tensor, autocast: torch.dtype | None
) -> None:
    """One step: values by the rule of accuracy, dtypes of the output and of every gradient and buffer."""
    exact = exact_twin(plain)(x.double())
    outputs, gradients = [], []
    for block in (plain, fused):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            y = block(leaf)
            outputs.append(y.detach().clone())
            y += 1  # legal on a fresh output
        y.float().sum().backward()
        gradients.append({"x": leaf.grad, **{k: p.grad for k, p in block.named_parameters()}})
    assert_as_accurate_as_eager(outputs[1], outputs[0], exact, "y")
    for key, expected in gradients[0].items():
        assert gradients[1][key].dtype == expected.dtype, key
        assert gradients[1][key].isfinite().all(), key
    for (key, b), c in zip(plain.named_buffers(), fused.buffers(), strict=True):
        assert b.dtype == c.dtype, key


@each_half
@each_block
@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_autocast(name, dtype, recipe):
    build, cin = BLOCKS[name]
    plain = build()
    fused = patched(copy.deepcopy(plain), recipe)
    x = torch.randn(3, cin, 6, 6).to(dtype, memory_format=torch.channels_last)
    assert_same_types(AddableOutput(plain), AddableOutput(fused), x, dtype)
    assert ran_as(fused, recipe if name != "basic" else "separate")


@each_half
@each_block
@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_half_weights_with_float32_norms(name, dtype, recipe):
    build, cin = BLOCKS[name]
    plain = build().to(dtype)
    for bn in each_bn(plain):
        bn.float()
    fused = patched(copy.deepcopy(plain), recipe)
    x = torch.randn(3, cin, 6, 6).to(dtype, memory_format=torch.channels_last)
    assert_same_types(AddableOutput(plain), AddableOutput(fused), x, None)
    assert ran_as(fused, recipe if name != "basic" else "separate")


class AddableOutput(nn.Module):
    """A block whose output may be added to in place, unpatched too: its last ReLU saves what it returns."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x).clone()


def formats(x: torch.Tensor) -> dict[str, torch.Tensor]:
    n, c, h, w = x.shape
    last = x.to(memory_format=torch.channels_last)
    return {
        "nchw": x,
        "channels_last": last,
        "slice": torch.cat([x, x], 1)[:, c // 2 : c // 2 + c],
        "slice_channels_last": torch.cat([last, last], 1).to(memory_format=torch.channels_last)[:, :c],
        "rows": torch.cat([x, x], 2)[:, :, ::2],
        "expanded": x[:1].expand(n, c, h, w),
        "four_pixels": x[:, :, :2, :2],
    }


@pytest.mark.parametrize("weights", ["nchw", "channels_last"])
@pytest.mark.parametrize("spelling", [*MATCHED, bottleneck(cin=16, width=4)], ids=lambda s: s.__name__)
def test_memory_formats(spelling, weights):
    plain = spelling()
    if weights == "channels_last":
        plain = plain.to(memory_format=torch.channels_last)
    for recipe in ("separate", "gram"):
        fused = fusedres.patch(copy.deepcopy(plain), recipe=recipe, strict=True)
        for name, x in formats(torch.randn(4, 16, 8, 8)).items():
            exact = exact_twin(plain)(x.double())
            y, z = copy.deepcopy(plain)(x), copy.deepcopy(fused)(x)
            assert z.stride() == y.stride() or 1 in y.shape, (name, recipe)
            assert z.is_contiguous() == y.is_contiguous(), (name, recipe)
            assert_as_accurate_as_eager(z, y, exact, f"{name}, {recipe}")
