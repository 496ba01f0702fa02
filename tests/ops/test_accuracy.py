"""The rule of accuracy in 16 bits: what it lets pass, and faults of a few percent that it has to catch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from block_accuracy import DRAWS, eagerly, errors_of, errors_over_draws, inputs, read
from block_forms import FORMS
from every_raw_op import CHECKS, SHAPES

from fusedres.ops import accuracy
from fusedres.ops.backend import Backend
from fusedres.ops.contract import (
    RAW_OPS,
    BnAddReluBackwardInput,
    BnAddReluForward,
    Conv1x1Forward,
    Conv3x3Forward,
)
from fusedres.ops.reference import REFERENCE

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MEASURED = Path(__file__).parents[2] / "bench" / "results" / "cpu" / "accuracy_slack.json"
WIDE = 8.0  # the slack of float32: what each fault here is small enough to pass with

each_half = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)


@each_half
def test_slack_is_the_one_measured(dtype):
    found = json.loads(MEASURED.read_text())["slack"][str(dtype).removeprefix("torch.")]
    assert accuracy.SLACK[dtype] == found["rounded_up"] >= found["needed"]


def test_limits():
    eps = torch.finfo(torch.bfloat16).eps
    assert accuracy.error_limit(0.5, torch.float32) == 1 + 8 * torch.finfo(torch.float32).eps
    assert accuracy.error_limit(0.5, torch.bfloat16) == 1 + accuracy.SLACK[torch.bfloat16] * eps
    assert accuracy.error_limit(0.0, torch.float64) == 8 * torch.finfo(torch.float64).eps


@each_half
@pytest.mark.parametrize("name", ["basic-projection", "bottleneck-frozen", "bottleneck-dy-mean-1"])
def test_eager_passes_against_itself_in_the_other_layout(name, dtype):
    form = next(form for form in FORMS if form.name == name)
    block, x, dy = inputs(form, dtype)
    config, units = read(block, x)
    own = errors_over_draws(eagerly, config, x, units, dy, DRAWS)
    call = config, x.contiguous(), units, dy.contiguous()
    _, exact = errors_of(eagerly(*call), *call)
    found = errors_over_draws(eagerly, *call, DRAWS).relative(exact)
    for error, yardstick in zip(found, own.relative(exact), strict=True):
        assert error <= accuracy.error_limit(yardstick, dtype)


def coarser(x: torch.Tensor) -> torch.Tensor:
    """x [...] rounded to a quarter of its precision."""
    mantissa, exponent = torch.frexp(x.float())
    steps = 1 / (
        2 * torch.finfo(x.dtype).eps
    )  # of |mantissa| in [1/2, 1) that the dtype tells apart, halved twice
    return torch.ldexp((mantissa * steps).round() / steps, exponent).to(x.dtype)


def residual_a_little_small(op: BnAddReluForward):
    """Adds 98 % of the residual in bfloat16, and more of it in float16."""
    if op.residual is not None:
        op = op._replace(residual=op.residual * (1 - 2.5 * torch.finfo(op.c.dtype).eps))
    return REFERENCE(op)


def coarse_input_gradient(op: BnAddReluBackwardInput):
    """Rounds the input gradient of BN to two bits fewer."""
    dc, dresidual = REFERENCE(op)
    return torch.empty_like(dc).copy_(coarser(dc)), dresidual


def coarse_activation(op: Conv1x1Forward | Conv3x3Forward):
    """Rounds what enters a convolution to two bits fewer."""
    return REFERENCE(op._replace(x=torch.empty_like(op.x).copy_(coarser(op.x))))


FAULTS = {
    "bn_add_relu_forward": ("identity_mask", residual_a_little_small),
    "bn_add_relu_backward_input": ("mask", coarse_input_gradient),
    "conv1x1_forward": ("raw", coarse_activation),
    "conv3x3_forward": ("raw", coarse_activation),
}


@each_half
@pytest.mark.parametrize("op", FAULTS)
def test_a_small_fault_is_caught(op, dtype, monkeypatch):
    form, function = FAULTS[op]
    case = replace(SHAPES[op][0], id="C24", shape=(2, 24, 5, 7), form=form, dtype=dtype)
    faulty = Backend("faulty", {**REFERENCE.functions, RAW_OPS[op]: function})
    CHECKS[op](REFERENCE, case)
    with pytest.raises(AssertionError, match="exceeds"):
        CHECKS[op](faulty, case)
    monkeypatch.setitem(accuracy.SLACK, dtype, WIDE)
    CHECKS[op](faulty, case)
