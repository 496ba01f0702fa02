"""The rule of accuracy in 16 bits: what it lets pass, and faults of a few percent that it has to catch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from block_accuracy import DRAWS, eagerly, errors_of, errors_over_draws, inputs, read
from block_forms import FORMS
from raw_op_cases import Case
from raw_op_checks import CHECKS

from fusedres import accuracy
from fusedres.backends.reference import ReferenceOps

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MEASURED = Path(__file__).parents[1] / "bench" / "results" / "cpu" / "accuracy_slack.json"
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


class ResidualALittleSmall(ReferenceOps):
    """Adds 98 % of the residual in bfloat16, and more of it in float16."""

    def bn_add_relu_forward(self, c, scale, shift, residual=None, *rest, **more):
        if residual is not None:
            residual = residual * (1 - 2.5 * torch.finfo(c.dtype).eps)
        return super().bn_add_relu_forward(c, scale, shift, residual, *rest, **more)


class CoarseInputGradient(ReferenceOps):
    """Rounds the input gradient of BN to two bits fewer."""

    def bn_add_relu_backward_input(self, *args, **more):
        dc, dresidual = super().bn_add_relu_backward_input(*args, **more)
        return torch.empty_like(dc).copy_(coarser(dc)), dresidual


class CoarseActivation(ReferenceOps):
    """Rounds what enters an inference convolution to two bits fewer."""

    def conv_bias_add_relu_forward(self, x, *rest):
        return super().conv_bias_add_relu_forward(torch.empty_like(x).copy_(coarser(x)), *rest)


FAULTS = {
    ResidualALittleSmall: ("bn_add_relu_forward", "identity_mask"),
    CoarseInputGradient: ("bn_add_relu_backward_input", "mask"),
    CoarseActivation: ("conv_bias_add_relu_forward", "bias"),
}


@each_half
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_small_fault_is_caught(fault, dtype, monkeypatch):
    op, form = FAULTS[fault]
    case = replace(Case("C24"), form=form, dtype=dtype)
    CHECKS[op](ReferenceOps(), case)
    with pytest.raises(AssertionError, match="exceeds"):
        CHECKS[op](fault(), case)
    monkeypatch.setitem(accuracy.SLACK, dtype, WIDE)
    CHECKS[op](fault(), case)
