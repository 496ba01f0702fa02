"""Checks of the two Gram ops on weights and moments, as in `conv1x1_checks`: against the op's own formula in float64 on
the very arguments, and against what the results are for, the BN of a 1x1 convolution, where eager has rounded c3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from conv1x1_cases import ConvCase, as_image, as_rows, vectors_before, weight_of
from raw_op_cases import Inputs
from raw_op_harness import assert_accurate, run
from torch import Tensor

from fusedres.ops.contract import (
    BatchNormVectors,
    BnAddReluForward,
    GramBackwardCoefficients,
    GramOutputStats,
)
from fusedres.ops.reference import REFERENCE

EPS = 1e-5


def finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)


def activation(inputs: Inputs, case: ConvCase) -> Tensor:
    """[N, Cin, H, W], finite."""
    c = inputs.c()
    v = vectors_before(inputs, c, case)
    return finite(REFERENCE(BnAddReluForward(c, v.scale, v.shift))[0])


def moments(a: Tensor) -> tuple[Tensor, Tensor]:
    """m [Cin], S [Cin, Cin] in float64."""
    rows = as_rows(a).double()
    centered = rows - rows.mean(0)
    return rows.mean(0), centered.t() @ centered / rows.shape[0]


def placed(inputs: Inputs, values: Tensor, special: bool = False) -> Tensor:
    """Of one or two dimensions, in the accumulation dtype; with NaN, Inf and -Inf somewhere."""
    return inputs.vector(spoiled(inputs, values.flatten(), special)).view(values.shape)


def spoiled(inputs: Inputs, values: Tensor, special: bool) -> Tensor:
    """The values [N] as they are, or three of them NaN, Inf and -Inf."""
    if not special:
        return values
    places = torch.randperm(values.numel(), generator=inputs.generator)[:3].to(values.device)
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=values.dtype, device=values.device)
    return values.scatter(0, places, bad)


def given_weight(inputs: Inputs, weight: Tensor, special: bool) -> Tensor:
    cin = weight.shape[1]
    values = spoiled(inputs, weight.flatten().double(), special)
    return inputs.place(values.view(weight.shape), (cin, 1, 1, 1), weight.dtype)


def check_gram_output_stats(ops: Any, case: ConvCase) -> None:
    inputs = Inputs(case)
    a = activation(inputs, case)
    weight = given_weight(inputs, weight_of(inputs, case), case.special)
    bias = inputs.vector(inputs.random((case.cout,)), case.dtype) if case.form == "bias" else None
    m, S = (placed(inputs, t) for t in moments(a))
    mean, var, center = run(ops, inputs, GramOutputStats(weight, bias, m, S))
    assert mean.dtype == var.dtype == center.dtype == inputs.acc
    assert torch.equal(center, m.to(case.dtype).to(inputs.acc)), (
        "center is not m rounded to the activation dtype"
    )

    def formula(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        w = weight.flatten(1).to(dtype)
        mean = w @ m.to(dtype)
        var = ((w @ S.to(dtype)) * w).sum(1).clamp(min=0)
        return mean if bias is None else mean + bias.to(dtype), var

    for what, found, eager, exact in zip(
        ("mean", "var"), (mean, var), formula(inputs.acc), formula(torch.float64), strict=True
    ):
        assert_accurate(found, eager, exact, what)
    if case.special:
        return
    # where eager has the rounded output only
    c3 = F.conv2d(a, weight, bias).to(inputs.acc)
    exact_c3 = F.conv2d(a.double(), weight.double(), None if bias is None else bias.double())
    both = (torch.var_mean(t, (0, 2, 3), correction=0) for t in (c3, exact_c3))
    for what, found, eager, exact in zip(("var", "mean"), (var, mean), *both, strict=True):
        assert_accurate(found, eager, exact, f"{what} of the convolution")


class Above(NamedTuple):
    """The BN above `c3 = a W^T + bias` in float64, of finite values: rows [P, C], vectors [Cout]."""

    a: Tensor
    centered_a: Tensor
    dz: Tensor
    w: Tensor  # [Cout, Cin]
    mean: Tensor  # of c3, or frozen
    invstd: Tensor
    gamma: Tensor

    @property
    def dc(self) -> Tensor:
        """The gradient of c3 under batch statistics, [P, Cout]."""
        normal = self.centered_a @ self.w.t() * self.invstd
        dz = self.dz - self.dz.mean(0) - normal * (self.dz * normal).mean(0)
        return self.gamma * self.invstd * dz


def above(inputs: Inputs, case: ConvCase, a: Tensor, dz: Tensor, w: Tensor, bias: Tensor | None) -> Above:
    a64, dz64 = as_rows(a).double(), as_rows(dz).double()
    centered_a = a64 - a64.mean(0)
    mean = a64.mean(0) @ w.t() if bias is None else a64.mean(0) @ w.t() + bias.double()
    var = (centered_a @ w.t()).square().mean(0)
    shift, gamma = 0.1 * inputs.random((case.cout,)), 1 + 0.3 * inputs.random((case.cout,))
    if case.form != "training":
        mean, var = mean + shift.to(mean), 1.3 * var
    gamma = (0.0 if case.zero_gamma else 1.0) * gamma.to(mean)
    return Above(a64, centered_a, dz64, w, mean, (var + EPS).rsqrt(), gamma)


def check_gram_backward_coefficients(ops: Any, case: ConvCase) -> None:
    inputs, training = Inputs(case), case.form == "training"
    a = activation(inputs, case)
    dz = finite(inputs.dy((case.shape[0], case.cout, *case.shape[2:])))
    weight = weight_of(inputs, case)
    bias = inputs.vector(inputs.random((case.cout,)), case.dtype) if "bias" in case.form else None
    bn = above(inputs, case, a, dz, weight.flatten(1).double(), bias)
    rows = bn.a.shape[0]
    m, S = (placed(inputs, t) if training else None for t in moments(a))
    center = None if m is None else placed(inputs, m.to(case.dtype))
    r = bn.dz.t() @ (bn.a if center is None else bn.a - center.double())
    r, sum_dz = (placed(inputs, t, case.special) for t in (r, bn.dz.sum(0)))
    weight = given_weight(inputs, weight, case.special)
    vectors = bn.mean, bn.invstd**-2 - EPS, bn.invstd, bn.gamma * bn.invstd, -bn.mean
    v = BatchNormVectors(*(placed(inputs, t) for t in vectors))
    args = r, sum_dz, weight, bias, v, rows, m, S, center
    dweight, dW, weight_dz, weight_a, offset = run(ops, inputs, GramBackwardCoefficients(*args))
    assert (weight_a is None, offset is None) == (not training,) * 2

    def formula(dtype: torch.dtype) -> tuple[Tensor, ...]:
        """dweight, dW, weight_dz; and weight_a."""
        w, raw, s, A = (t.to(dtype) for t in (weight.flatten(1), r, sum_dz, v.scale))
        if m is not None:
            raw = raw - torch.outer(s, m.to(dtype) - center.to(dtype))
        centered = (raw * w).sum(1)
        if m is None:
            centered = centered + ((0.0 if bias is None else bias.to(dtype)) - v.mean.to(dtype)) * s
        of_weight = v.invstd.to(dtype) * centered
        scaled = A[:, None] * raw, A[:, None] * w
        if S is None:
            return of_weight, *scaled
        sloped = (-A * v.invstd.to(dtype) * of_weight / rows)[:, None]
        return of_weight, scaled[0] + sloped * (w @ (S.to(dtype) * rows)), scaled[1], w.t() @ (sloped * w)

    eager, exact = formula(inputs.acc), formula(torch.float64)
    results = (dweight, dW, weight_dz, weight_a)[: len(exact)]
    names = ("dweight", "dW", "weight_dz", "weight_a")[: len(exact)]
    for what, found, e, x in zip(names, results, eager, exact, strict=True):
        assert found.dtype == inputs.acc, what
        assert_accurate(found, e, x, what)
    if m is None:
        return
    both = (
        -(sum_dz.to(t) / rows) @ of_dz.to(t) - (m.to(t) - center.to(t)) @ of_a.to(t)
        for t, (*_, of_dz, of_a) in ((inputs.acc, eager), (torch.float64, exact))
    )
    assert_accurate(offset, *both, "offset")
    if case.special:
        return
    da = bn.dz @ weight_dz.double() + (bn.a - center.double()) @ weight_a.double() + offset.double()
    eager_da, eager_dW = eager_gradients(inputs, case, bn, a, dz, weight)
    assert_accurate(as_image(da, a).to(case.dtype), eager_da, as_image(bn.dc @ bn.w, a), "da")
    assert_accurate(
        dW.to(case.dtype), eager_dW.flatten(1), bn.dc.t() @ bn.centered_a, "dW of the convolution"
    )


def eager_gradients(
    inputs: Inputs, case: ConvCase, bn: Above, a: Tensor, dz: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """da and dW of convolution and BN apart, every result rounded."""
    statistics = bn.mean.to(inputs.acc), bn.invstd.to(inputs.acc), True, EPS, [True, False, False]
    c3, gamma = F.conv2d(a, weight), bn.gamma.to(inputs.acc)
    dc, _, _ = torch.ops.aten.native_batch_norm_backward(dz, c3, gamma, None, None, *statistics)
    window = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    da, dW, _ = torch.ops.aten.convolution_backward(dc, a, weight, None, *window, [True, True, False])
    return da, dW
