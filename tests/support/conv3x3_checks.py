"""The fused 3x3 convolutions: their inputs, and one check each, as in `conv1x1_checks`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from conv1x1_cases import ConvCase, weight_of
from conv1x1_checks import check_forward
from raw_op_cases import Inputs
from raw_op_harness import assert_accurate, assert_input_gradient, pack, row, run
from torch.nn.grad import conv2d_input

from fusedres.ops.contract import BnAddReluForward, Conv3x3BackwardInput, Conv3x3Forward

# maps smaller than a window, of odd and even sides, which a stride of 2 leaves differently
SHAPES = (
    ConvCase("C3to17", (2, 3, 5, 7), cout=17),
    ConvCase("C24to8", (1, 24, 3, 3), cout=8),
    ConvCase("even", (2, 16, 6, 4), cout=24),
    ConvCase("P1", (1, 24, 1, 1), cout=24),
    ConvCase("N0", (0, 24, 5, 7), cout=8),
)
LAYOUTS = tuple(ConvCase(layout, (2, 8, 5, 7), layout, cout=16) for layout in ("offset", "nchw", "mixed"))
VALUES = (
    ConvCase("bias30", (2, 16, 6, 5), cout=16, bias_before=30.0),
    ConvCase("nan_inf", (2, 8, 7, 5), cout=8, special=True),
)
FORMS = {
    "conv3x3_forward": (
        "prologue_identity_mask",
        "prologue_stats",
        "stride2_stats",
        "stride2_prologue_projection_mask",
        "prologue_projection",
        "identity_no_relu",
        "affine",
        "raw",
    ),
    "conv3x3_backward_input": (
        "bn_identity_mask",
        "bn_frozen_no_relu",
        "identity",
        "stride2_bn",
        "stride2_identity_mask",
        "stride2",
    ),
}


def cases_of(op: str) -> Iterator[ConvCase]:
    """Every case of one op, dtype and device still to be chosen with `dataclasses.replace`."""
    for case in SHAPES + LAYOUTS + VALUES:
        for form in FORMS[op]:
            # eager BN refuses a single row in training
            if case.id != "P1" or "bn" not in form or "frozen" in form:
                yield replace(case, form=form)


def check_conv3x3_forward(ops: Any, case: ConvCase) -> None:
    check_forward(ops, case, Conv3x3Forward, 3)


def check_conv3x3_backward_input(ops: Any, case: ConvCase) -> None:
    inputs, form = Inputs(case), case.form
    stride, frozen, relu = 2 if "stride2" in form else 1, "frozen" in form, "no_relu" not in form
    x, weight = inputs.c(), weight_of(inputs, case, 3)
    n, _, h, w = x.shape
    shape = n, case.cout, (h - 1) // stride + 1, (w - 1) // stride + 1
    dy, c, v, grads = inputs.dy(shape), None, None, None
    if "bn" in form:
        c = inputs.activation(shape, case.mean_over_std)
        v = inputs.vectors(c, frozen=frozen)
        grads = inputs.grads(v, dy.numel() // case.cout, frozen=frozen)
    shortcut = inputs.dy(case.shape) if "identity" in form else None
    mask, joined = None, shortcut
    if "mask" in form:
        keep = (inputs.random(case.shape) > 0).to(case.device)
        mask, joined = pack(keep, inputs), torch.where(keep, shortcut, 0)
    op = Conv3x3BackwardInput(dy, x, weight, stride, c, v, grads, relu, shortcut, mask)
    dx, dc = run(ops, inputs, op)
    exact, eager = dy.double(), dy
    assert (dc is None) == (c is None)
    if c is not None:
        dz = dy
        if relu:
            dz = torch.where(ops(BnAddReluForward(c, v.scale, v.shift))[0] <= 0, 0, dy)
        assert_input_gradient(dc, dz, dz.double(), c, grads, "dc")
        exact, eager = row(grads.A) * dz.double(), grads.A[:, None, None] * dz
        if grads.B is not None:
            exact = exact + (row(grads.B) * c.double() + row(grads.K))
            eager = eager + (grads.B[:, None, None] * c + grads.K[:, None, None])
    exact = conv2d_input(x.shape, weight.double(), exact, stride, 1)
    eager = conv2d_input(x.shape, weight, eager.to(case.dtype), stride, 1)
    if joined is not None:
        exact, eager = exact + joined.double(), eager + joined
    assert dx.dtype == case.dtype and dx.shape == x.shape
    assert_accurate(dx, eager, exact, "dx")


CHECKS: dict[str, Callable[[Any, ConvCase], None]] = {
    "conv3x3_forward": check_conv3x3_forward,
    "conv3x3_backward_input": check_conv3x3_backward_input,
}
