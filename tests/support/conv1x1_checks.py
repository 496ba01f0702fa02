"""One check per fused 1x1 op, for any backend: `CHECKS[op](ops, case)` raises AssertionError on a wrong one.

Exact values are float64, from the activation that the backend's own `bn_add_relu_forward` gives, rounded as
the contract has it. The yardstick is what eager PyTorch makes of that activation in the tested dtype:
convolution, BN, addition and ReLU apart, every result rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from conv1x1_cases import (
    ConvCase,
    as_image,
    as_rows,
    vectors_before,
    weight_of,
)
from gram_algebra_checks import check_gram_backward_coefficients, check_gram_output_stats
from raw_op_cases import Inputs
from raw_op_harness import (
    assert_accurate,
    assert_input_gradient,
    assert_mask_of,
    assert_sums,
    eager_affine,
    eager_batch_norm_backward,
    pack,
    row,
    run,
)
from torch import Tensor

from fusedres.ops.contract import (
    BnAddReluForward,
    Conv1x1BackwardInput,
    Conv1x1BackwardWeight,
    Conv1x1Forward,
    Conv1x1GramBackwardInput,
    Conv3x3Forward,
    Gram,
)

EPS = 1e-5


def check_conv1x1_forward(ops: Any, case: ConvCase) -> None:
    check_forward(ops, case, Conv1x1Forward, 1)


def check_forward(ops: Any, case: ConvCase, kind: type[Conv1x1Forward | Conv3x3Forward], kernel: int) -> None:
    """A fused convolution of any window, padded so that a stride of 1 keeps the size."""
    inputs, form = Inputs(case), case.form
    x = inputs.c()
    weight = weight_of(inputs, case, kernel)
    bias = inputs.vector(inputs.random((case.cout,)), case.dtype) if "bias" in form else None
    stride = 2 if "stride2" in form else 1
    op = kind(x, weight, stride=stride, save_mask="mask" in form, save_stats="stats" in form)
    op = op if bias is None else op._replace(bias=bias)
    a = x
    if "prologue" in form:
        v = vectors_before(inputs, x, case)
        a, op = (
            ops(BnAddReluForward(x, v.scale, v.shift))[0],
            op._replace(in_scale=v.scale, in_shift=v.shift),
        )
    window = stride, kernel // 2
    eager = F.conv2d(a, weight, bias, *window)
    exact = F.conv2d(a.double(), weight.double(), None if bias is None else bias.double(), *window)
    normalised = any(part in form for part in ("mask", "identity", "projection", "affine"))
    if normalised:
        after = inputs.vectors(exact)
        added = "identity" in form or "projection" in form
        residual = inputs.activation(tuple(exact.shape)) if added else None
        rv = inputs.vectors(residual) if "projection" in form else None
        relu = "no_relu" not in form
        op = op._replace(scale=after.scale, shift=after.shift, residual=residual, relu=relu)
        exact, eager = (
            exact * row(after.scale) + row(after.shift),
            eager_affine(eager, after.scale, after.shift),
        )
        if rv is not None:
            op = op._replace(residual_scale=rv.scale, residual_shift=rv.shift)
            exact = exact + (residual.double() * row(rv.scale) + row(rv.shift))
            eager = eager + eager_affine(residual, rv.scale, rv.shift)
        elif residual is not None:
            exact, eager = exact + residual.double(), eager + residual
        if relu:
            exact, eager = exact.relu(), eager.relu()
    out = run(ops, inputs, op)
    assert out.y.dtype == case.dtype
    assert_accurate(out.y, eager, exact, "y")
    assert (out.mask is not None, out.mean is not None, out.var is not None) == (
        op.save_mask,
        op.save_stats,
        op.save_stats,
    )
    if out.mask is not None:
        assert_mask_of(out.mask, out.y)
    if out.mean is not None:
        assert_statistics_of(out.y, out.mean, out.var, inputs)


def assert_statistics_of(y: Tensor, mean: Tensor, var: Tensor, inputs: Inputs) -> None:
    """mean and var are those of y as it was returned, rounded."""
    assert mean.dtype == var.dtype == inputs.acc
    exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    eager_var, eager_mean = torch.var_mean(y.to(inputs.acc), (0, 2, 3), correction=0)
    finite = exact_var.isfinite()
    assert torch.equal(mean.isfinite(), finite) and torch.equal(var.isnan(), ~finite), "NaN or Inf was lost"
    assert_accurate(mean[finite], eager_mean[finite], exact_mean[finite], "mean")
    assert_accurate(var[finite], eager_var[finite], exact_var[finite], "var")


def check_gram(ops: Any, case: ConvCase) -> None:
    inputs = Inputs(case)
    c = inputs.c()
    v = vectors_before(inputs, c, case)
    m, S = run(ops, inputs, Gram(c, v.scale, v.shift))
    a = ops(BnAddReluForward(c, v.scale, v.shift))[0]
    rows = as_rows(a).shape[0]
    assert m.dtype == S.dtype == inputs.acc

    def moments(a: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        centered = (a - a.mean(0)).to(dtype).to(a.dtype)  # products take the activation dtype
        return a.mean(0), centered.t() @ centered / rows

    both = moments(as_rows(a).to(inputs.acc), case.dtype), moments(as_rows(a).double(), torch.float64)
    for what, actual, eager, exact in zip(("m", "S"), (m, S), *both, strict=True):
        finite = exact.isfinite()
        assert torch.equal(actual.isfinite(), finite), f"{what}: NaN or Inf was lost"
        assert_accurate(actual[finite], eager[finite], exact[finite], what)
    assert case.special or rows == 0 or torch.equal(S, S.t()), "S is not symmetric"
    if case.special or rows == 0:
        return
    # what S is for: the variance of the convolution that follows, where eager has the rounded output only
    weight = weight_of(inputs, case)
    w = weight.flatten(1).double()
    var = ((w @ S.double()) * w).sum(1).to(inputs.acc)
    exact_var = F.conv2d(a.double(), weight.double()).var((0, 2, 3), correction=0)
    eager_var = F.conv2d(a, weight).to(inputs.acc).var((0, 2, 3), correction=0)
    assert_accurate(var, eager_var, exact_var, "var of the convolution")


def masked_dy(inputs: Inputs, case: ConvCase, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """dy [N, Cout, H, W], its packed mask if the form has one, and dz, the select."""
    n, _, h, w = like.shape
    dy = inputs.dy((n, case.cout, h, w))
    if "mask" not in case.form:
        return dy, None, dy
    keep = (inputs.random(tuple(dy.shape)) > 0).to(case.device)
    return dy, pack(keep, inputs), torch.where(keep, dy, 0)


def check_conv1x1_backward_weight(ops: Any, case: ConvCase) -> None:
    inputs = Inputs(case)
    c = inputs.c()
    dy, mask, dz = masked_dy(inputs, case, c)
    v = vectors_before(inputs, c, case)
    a = ops(BnAddReluForward(c, v.scale, v.shift))[0]
    finite_a = as_rows(a).double().nan_to_num(0.0, 0.0, 0.0)
    center = inputs.vector(finite_a.mean(0).nan_to_num(0.0)) if "center" in case.form else None
    rc, dbias = run(ops, inputs, Conv1x1BackwardWeight(dy, mask, c, v.scale, v.shift, center))
    assert rc.dtype == dbias.dtype == inputs.acc, "R or dbias was rounded to the activation dtype"

    centered_a = as_rows(a).double() if center is None else as_rows(a).double() - center.double()
    exact = as_rows(dz).double().t() @ centered_a, as_rows(dz).double().sum(0)
    # the contract lets a - center be rounded to the activation dtype, and no more
    eager_dz = as_rows(dz).to(inputs.acc)
    eager = eager_dz.t() @ centered_a.to(case.dtype).to(inputs.acc), eager_dz.sum(0)
    assert_accurate(rc, eager[0], exact[0], "Rc")
    assert_accurate(dbias, eager[1], exact[1], "dbias")
    if center is None or case.special or as_rows(c).shape[0] < 2:
        return
    # what Rc is for: the sum over dz*(c3 - mean) of the BN above, where eager has the rounded c3
    weight = weight_of(inputs, case)
    centered = (rc.double() * weight.flatten(1).double()).sum(1).to(inputs.acc)
    c3, exact_c3 = F.conv2d(a, weight), F.conv2d(a.double(), weight.double())
    mean, exact_mean = c3.to(inputs.acc).mean((0, 2, 3)), exact_c3.mean((0, 2, 3))
    exact_centered = (dz.double() * (exact_c3 - exact_mean[:, None, None])).sum((0, 2, 3))
    assert_accurate(centered, eager_batch_norm_backward(dz, c3, mean)[1], exact_centered, "dweight")


class GramBackward(NamedTuple):
    """Arguments of `conv1x1_gram_backward_input` beside the activations, and eager's result of the step."""

    weight_dz: Tensor
    weight_a: Tensor | None
    center: Tensor | None
    offset: Tensor | None
    eager: Tensor  # [N, Cin, H, W], the gradient of the activation


def gram_backward(inputs: Inputs, case: ConvCase, a: Tensor, dz: Tensor) -> GramBackward:
    """Consistent coefficients of the BN above `c3 = a W^T`; a and dz as eager has them."""
    weight = weight_of(inputs, case)
    w, a64, dz64 = (
        t.double().nan_to_num(0.0, 0.0, 0.0) for t in (weight.flatten(1), as_rows(a), as_rows(dz))
    )
    rows = max(1, a64.shape[0])
    gamma = (0.0 if case.zero_gamma else 1.0) * (1 + 0.3 * inputs.random((case.cout,)).to(case.device))
    c3 = a64 @ w.t()
    m, mean = a64.sum(0) / rows, c3.sum(0) / rows
    invstd = ((c3 - mean).square().sum(0) / rows + EPS).rsqrt()
    A, sum_dz = gamma * invstd, dz64.sum(0)
    weight_dz = inputs.vector((A[:, None] * w).flatten()).view(case.cout, -1)
    if "frozen" in case.form:
        dc = A[:, None, None].to(inputs.acc) * dz
        return GramBackward(weight_dz, *(None,) * 3, F.conv_transpose2d(dc.to(case.dtype), weight))
    B = -A * invstd**2 * (dz64 * (c3 - mean)).sum(0) / rows
    weight_a = inputs.vector((w.t() @ (B[:, None] * w)).flatten()).view(a64.shape[1], -1)
    vectors = (inputs.vector(t) for t in (m, -(A * sum_dz / rows) @ w))
    eager_c3 = F.conv2d(a, weight)
    if eager_c3.numel() == 0 or case.special:  # nothing to compare, or NaN everywhere
        return GramBackward(weight_dz, weight_a, *vectors, torch.zeros_like(a))
    dc, _, _ = torch.ops.aten.native_batch_norm_backward(
        dz,
        eager_c3,
        gamma.to(inputs.acc),
        None,
        None,
        mean.to(inputs.acc),
        invstd.to(inputs.acc),
        True,
        EPS,
        [True, False, False],
    )
    return GramBackward(weight_dz, weight_a, *vectors, F.conv_transpose2d(dc, weight))


def check_conv1x1_gram_backward_input(ops: Any, case: ConvCase) -> None:
    inputs = Inputs(case)
    c = inputs.c()
    dy, mask, dz = masked_dy(inputs, case, c)
    v = vectors_before(inputs, c, case)
    a = ops(BnAddReluForward(c, v.scale, v.shift))[0]
    if "training" in case.form and as_rows(a).shape[0] == 1:
        return  # F.batch_norm refuses one row in training
    g = gram_backward(inputs, case, a, dz)
    args = dy, mask, c, v, *g[:4]
    dz_below, *sums = run(ops, inputs, Conv1x1GramBackwardInput(*args))
    assert dz_below.dtype == case.dtype
    keep = ~(a <= 0)
    da = as_rows(dz).double() @ g.weight_dz.double()
    if g.weight_a is not None:
        da = da + (as_rows(a).double() - g.center.double()) @ g.weight_a.double() + g.offset.double()
    exact = torch.where(keep, as_image(da, c), 0)
    eager = torch.where(keep, exact.to(case.dtype) if case.special else g.eager, 0)
    assert_accurate(dz_below, eager, exact, "dz_below")
    assert_sums(tuple(sums), dz_below, dz_below.double(), c, v.mean)  # of the rounded values
    if not case.special and c.numel():
        assert_sums_of_rows(sums, eager, exact, c, v.mean)


def assert_sums_of_rows(sums: list[Tensor], eager: Tensor, exact: Tensor, c: Tensor, mean: Tensor) -> None:
    """The two channel sums, on the scale of their terms: in training the exact `sum dz_below` is near 0."""
    terms = exact, exact * (c.double() - row(mean))
    for what, found, e, x in zip(
        ("sum_dz", "sum_dz_centered"), sums, eager_batch_norm_backward(eager, c, mean), terms, strict=True
    ):
        scale = x.abs().sum((0, 2, 3))
        found, e = ((t.double() + scale).to(mean.dtype) for t in (found, e))
        assert_accurate(found, e, x.sum((0, 2, 3)) + scale, what)


def check_conv1x1_backward_input(ops: Any, case: ConvCase) -> None:
    inputs, form = Inputs(case), case.form
    n, _, h, w = case.shape
    c = inputs.first = inputs.activation((n, case.cout, h, w), case.mean_over_std)
    dy = inputs.dy((n, case.cout, h, w))
    v = inputs.vectors(c, frozen="frozen" in form)
    grads = inputs.grads(v, n * h * w, frozen="frozen" in form)
    if form == "identity":  # A may be another tensor than scale
        grads = grads._replace(A=inputs.vector(v.scale.cpu()))
    weight = weight_of(inputs, case)
    relu = form != "no_relu"
    shortcut = inputs.dy(case.shape) if "identity" in form else None
    mask, joined = None, shortcut
    if "mask" in form:
        keep = (inputs.random(case.shape) > 0).to(case.device)
        mask, joined = pack(keep, inputs), torch.where(keep, shortcut, 0)
    dx, dc = run(ops, inputs, Conv1x1BackwardInput(dy, c, v, grads, weight, relu, shortcut, mask))
    positive = (
        ~(ops(BnAddReluForward(c, v.scale, v.shift))[0] <= 0) if relu else c.new_ones((), dtype=torch.bool)
    )
    dz = torch.where(positive, dy, 0)
    assert_input_gradient(dc, dz, dz.double(), c, grads, "dc")
    exact, eager = row(grads.A) * dz.double(), grads.A[:, None, None] * dz
    if grads.B is not None:
        exact = exact + (row(grads.B) * c.double() + row(grads.K))
        eager = eager + (grads.B[:, None, None] * c + grads.K[:, None, None])
    exact = F.conv_transpose2d(exact, weight.double())
    eager = F.conv_transpose2d(eager.to(case.dtype), weight)
    if joined is not None:
        exact, eager = exact + joined.double(), eager + joined
    assert dx.dtype == case.dtype and dx.shape == case.shape
    assert_accurate(dx, eager, exact, "dx")


CHECKS: dict[str, Callable[[Any, ConvCase], None]] = {
    "conv1x1_forward": check_conv1x1_forward,
    "gram": check_gram,
    "gram_output_stats": check_gram_output_stats,
    "gram_backward_coefficients": check_gram_backward_coefficients,
    "conv1x1_backward_weight": check_conv1x1_backward_weight,
    "conv1x1_gram_backward_input": check_conv1x1_gram_backward_input,
    "conv1x1_backward_input": check_conv1x1_backward_input,
}
