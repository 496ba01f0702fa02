"""One check per raw op, for any backend: `CHECKS[op](ops, case)` raises AssertionError where it is wrong.

`ops` is called with the records of `fusedres.ops.contract`; cases come from `raw_op_cases.cases_of(op)`. Exact values
are float64, from plain torch; the yardstick is what eager PyTorch makes of the same inputs in the tested dtype and
layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from raw_op_cases import Case, Inputs, bits
from raw_op_harness import (
    assert_accurate,
    assert_input_gradient,
    assert_mask_of,
    assert_sums,
    eager_affine,
    pack,
    row,
    run,
    unpack,
)
from raw_op_pool_checks import (
    check_bn_relu_maxpool_backward_input,
    check_bn_relu_maxpool_backward_reduce,
    check_bn_relu_maxpool_forward,
    check_conv_backward_input,
    check_conv_backward_weight,
)
from torch import Tensor

from fusedres.ops.contract import (
    BatchNormVectors,
    BnAddReluBackwardInput,
    BnAddReluBackwardReduce,
    BnAddReluForward,
    BnBackwardCoefficients,
    BnScaleShift,
    BnStats,
    ReluBackward,
)


def check_bn_stats(ops: Any, case: Case) -> None:
    inputs = Inputs(case)
    c = inputs.c()
    mean, var = run(ops, inputs, BnStats(c))
    assert mean.dtype == var.dtype == inputs.acc and mean.shape == var.shape == (c.shape[1],)
    exact_var, exact_mean = torch.var_mean(c.double(), (0, 2, 3), correction=0)
    eager_var, eager_mean = torch.var_mean(c.to(inputs.acc), (0, 2, 3), correction=0)
    finite = exact_var.isfinite()
    assert torch.equal(mean.isfinite(), finite) and torch.equal(var.isnan(), ~finite), "NaN or Inf was lost"
    assert_accurate(mean[finite], eager_mean[finite], exact_mean[finite], "mean")
    assert_accurate(var[finite], eager_var[finite], exact_var[finite], "var")
    assert (var[finite] >= 0).all(), "negative variance"


def check_bn_scale_shift(ops: Any, case: Case) -> None:
    inputs, channels = Inputs(case), case.shape[1]
    mean = inputs.vector(case.mean_over_std + inputs.random((channels,)))
    var = inputs.vector(inputs.random((channels,)).square())
    half = torch.bfloat16 if case.form == "half_weight" else inputs.acc
    weight = (
        None if case.form in ("bias_only", "plain") else inputs.vector(1 + inputs.random((channels,)), half)
    )
    bias = None if case.form in ("weight_only", "plain") else inputs.vector(inputs.random((channels,)), half)
    eps = 1e-5
    vectors = run(ops, inputs, BnScaleShift(mean, var, weight, bias, eps))
    assert isinstance(vectors, BatchNormVectors) and all(v.dtype == inputs.acc for v in vectors)
    assert torch.equal(vectors.mean, mean) and torch.equal(vectors.var, var)
    w, b = (default if v is None else v.to(inputs.acc) for v, default in ((weight, 1.0), (bias, 0.0)))
    w64, b64 = (v.double() if isinstance(v, Tensor) else v for v in (w, b))
    eager_invstd = (var + eps).rsqrt()
    exact_invstd = (var.double() + eps).rsqrt()
    assert_accurate(vectors.invstd, eager_invstd, exact_invstd, "invstd")
    assert_accurate(vectors.scale, w * eager_invstd, w64 * exact_invstd, "scale")
    # from the scale that was returned, so that the two errors cancel in scale*mean + shift = bias
    scale = vectors.scale
    assert_accurate(vectors.shift, b - mean * scale, b64 - mean.double() * scale.double(), "shift")


def forward_parts(inputs: Inputs) -> tuple[Any, ...]:
    """c, vectors, residual, residual vectors as the form has them."""
    c = inputs.c()
    vectors = inputs.vectors(c)
    residual = inputs.activation(inputs.case.shape) if "identity" in inputs.case.form else None
    if "projection" not in inputs.case.form:
        return c, vectors, residual, None
    residual = inputs.c()
    return c, vectors, residual, inputs.vectors(residual)


def check_bn_add_relu_forward(ops: Any, case: Case) -> None:
    inputs = Inputs(case)
    c, v, residual, rv = forward_parts(inputs)
    relu, save_mask = "no_relu" not in case.form, "mask" in case.form
    pair = (None, None) if rv is None else (rv.scale, rv.shift)
    y, mask = run(ops, inputs, BnAddReluForward(c, v.scale, v.shift, residual, *pair, relu, save_mask))
    exact, eager = c.double() * row(v.scale) + row(v.shift), eager_affine(c, v.scale, v.shift)
    if rv is not None:
        exact = exact + (residual.double() * row(rv.scale) + row(rv.shift))
        eager = eager + eager_affine(residual, rv.scale, rv.shift)
    elif residual is not None:
        exact, eager = exact + residual.double(), eager + residual
    if relu:
        exact, eager = exact.relu(), eager.relu()
    assert y.dtype == case.dtype
    assert_accurate(y, eager, exact, "y")
    assert (mask is not None) == save_mask
    if mask is not None:
        assert_mask_of(mask, y)


def backward_parts(ops: Any, inputs: Inputs) -> tuple[Any, ...]:
    """dy, c, vectors, packed mask or None, dz (the select, as eager would make it), shortcut_c."""
    case = inputs.case
    c = inputs.c()
    dy = inputs.dy()
    vectors = inputs.vectors(c, frozen="frozen" in case.form)
    shortcut_c = inputs.c() if "projection" in case.form else None
    keep, mask = torch.ones(case.shape, dtype=torch.bool, device=case.device), None
    if "mask" in case.form:
        keep = (inputs.random(case.shape) > 0).to(case.device)
        mask = pack(keep, inputs)
    elif "no_relu" not in case.form:  # the backend's own signs
        keep = ~(ops(BnAddReluForward(c, vectors.scale, vectors.shift))[0] <= 0)
    return dy, c, vectors, mask, torch.where(keep, dy, 0), shortcut_c


def check_bn_add_relu_backward_reduce(ops: Any, case: Case) -> None:
    inputs = Inputs(case)
    dy, c, v, mask, dz, shortcut_c = backward_parts(ops, inputs)
    shortcut_mean = None if shortcut_c is None else inputs.vectors(shortcut_c).mean
    op = BnAddReluBackwardReduce(dy, c, v, mask, "no_relu" not in case.form, shortcut_c, shortcut_mean)
    sum_dz, centered, shortcut = run(ops, inputs, op)
    assert_sums((sum_dz, centered), dz, dz.double(), c, v.mean)
    assert (shortcut is None) == (shortcut_c is None)
    if shortcut_c is not None:
        assert_sums((sum_dz, shortcut), dz, dz.double(), shortcut_c, shortcut_mean)


def check_bn_backward_coefficients(ops: Any, case: Case) -> None:
    inputs, channels = Inputs(case), case.shape[1]
    rows, training = max(1, case.shape[0] * case.shape[2] * case.shape[3]), case.form == "training"
    v = inputs.vectors(inputs.c())
    sum_dz = inputs.vector(rows * case.dy_mean + inputs.random((channels,)))
    centered = inputs.vector(inputs.random((channels,)))
    grads = run(ops, inputs, BnBackwardCoefficients(sum_dz, centered, v, rows, training))
    assert torch.equal(grads.dbias, sum_dz) and torch.equal(grads.A, v.scale)
    s, i, m, d, k = (t.double() for t in (v.scale, v.invstd, v.mean, sum_dz, centered))
    assert_accurate(grads.dweight, v.invstd * centered, i * k, "dweight")
    if not training:
        assert grads.B is None and grads.K is None
        return
    assert_accurate(grads.B, -v.scale * v.invstd * (v.invstd * centered) / rows, -s * i * i * k / rows, "B")
    exact = -s * d / rows - grads.B.double() * m  # with the B that was returned: B*mean + K is then exact
    assert_accurate(grads.K, -v.scale * sum_dz / rows - grads.B * v.mean, exact, "K")


def check_bn_add_relu_backward_input(ops: Any, case: Case) -> None:
    inputs = Inputs(case)
    dy, c, v, mask, dz, shortcut_c = backward_parts(ops, inputs)
    frozen, relu, save_dz = ("frozen" in case.form), ("no_relu" not in case.form), ("identity" in case.form)
    rows = dy.numel() // dy.shape[1]
    grads = inputs.grads(v, rows, frozen)
    shortcut_grads = None if shortcut_c is None else inputs.grads(inputs.vectors(shortcut_c), rows, frozen)
    args = dy, c, v, grads, mask, relu, shortcut_c, shortcut_grads, save_dz
    dc, dresidual = run(ops, inputs, BnAddReluBackwardInput(*args))
    assert_input_gradient(dc, dz, dz.double(), c, grads, "dc")
    assert (dresidual is None) == (not save_dz and shortcut_c is None)
    if shortcut_c is not None:
        assert_input_gradient(dresidual, dz, dz.double(), shortcut_c, shortcut_grads, "dshortcut")
    elif save_dz:
        assert torch.equal(bits(dresidual.contiguous()), bits(dz.contiguous())), (
            "the identity's gradient is not dz"
        )


def check_bn_layer(ops: Any, case: Case) -> None:
    """A whole BN (+ identity) + ReLU layer, forward and backward, against autograd through F.batch_norm."""
    inputs, channels, eps = Inputs(case), case.shape[1], 1e-5
    c = inputs.c()
    dy = inputs.dy()
    residual = inputs.activation(case.shape) if case.form == "identity" else None
    weight = inputs.vector(1 + 0.3 * inputs.random((channels,)))
    bias = inputs.vector(0.5 * inputs.random((channels,)))
    vectors = ops(BnScaleShift(*ops(BnStats(c)), weight, bias, eps))
    y, mask = ops(BnAddReluForward(c, vectors.scale, vectors.shift, residual, None, None, True, True))
    keep = unpack(mask, y)
    sums = ops(BnAddReluBackwardReduce(dy, c, vectors, mask))
    rows = c.numel() // channels
    grads = ops(BnBackwardCoefficients(*sums[:2], vectors, rows, True))
    dc, _ = ops(BnAddReluBackwardInput(dy, c, vectors, grads, mask))

    def plain(dtype: torch.dtype, acc: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(d).requires_grad_() for t, d in ((c, dtype), (weight, acc), (bias, acc))]
        z = F.batch_norm(leaves[0], None, None, *leaves[1:], training=True, eps=eps)
        z = z if residual is None else z + residual.to(dtype)
        gradients = torch.autograd.grad(z, leaves, torch.where(keep, dy, 0).to(dtype))
        return (torch.where(keep, z, 0), *gradients)

    found = (y, dc, grads.dweight, grads.dbias)
    eager, exact = plain(case.dtype, inputs.acc), plain(torch.float64, torch.float64)
    for what, a, e, x in zip(("y", "dc", "dweight", "dbias"), found, eager, exact, strict=True):
        assert_accurate(a, e, x, what)


def check_relu_backward(ops: Any, case: Case) -> None:
    inputs = Inputs(case)
    dy = inputs.first = inputs.dy()
    keep = (inputs.random(case.shape) > 0).to(case.device)
    dz = run(ops, inputs, ReluBackward(dy, pack(keep, inputs)))
    assert torch.equal(bits(dz.contiguous()), bits(torch.where(keep, dy, 0).contiguous()))


CHECKS: dict[str, Callable[[Any, Case], None]] = {
    "bn_stats": check_bn_stats,
    "bn_scale_shift": check_bn_scale_shift,
    "bn_add_relu_forward": check_bn_add_relu_forward,
    "bn_add_relu_backward_reduce": check_bn_add_relu_backward_reduce,
    "bn_backward_coefficients": check_bn_backward_coefficients,
    "bn_add_relu_backward_input": check_bn_add_relu_backward_input,
    "relu_backward": check_relu_backward,
    "bn_layer": check_bn_layer,
    "bn_relu_maxpool_forward": check_bn_relu_maxpool_forward,
    "bn_relu_maxpool_backward_reduce": check_bn_relu_maxpool_backward_reduce,
    "bn_relu_maxpool_backward_input": check_bn_relu_maxpool_backward_input,
    "conv_backward_weight": check_conv_backward_weight,
    "conv_backward_input": check_conv_backward_input,
}
