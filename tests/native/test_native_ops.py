"""The native backend on the CPU, by the checks that every backend has to pass."""

from dataclasses import replace

import pytest
import torch
from raw_op_cases import Case, Inputs, bits, cases_of
from raw_op_checks import CHECKS, backward_parts, forward_parts

from fusedres.ops.contract import (
    BatchNormGrads,
    BnAddReluBackwardInput,
    BnAddReluForward,
    BnReluMaxpoolBackwardInput,
    BnReluMaxpoolForward,
    ConvBackwardInput,
    op_name,
)
from fusedres.ops.native import functions, library, reasons, winograd
from fusedres.ops.reference import REFERENCE

pytestmark = pytest.mark.skipif(not library.is_built(), reason="no compiled library in this installation")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [pytest.param(op, case, id=f"{op}-{case}") for op in CHECKS for case in cases_of(op)]


class Recorder:
    """The native ops, then the reference; remembers which of them served each call."""

    def __init__(self):
        self.backends = functions.backend(), REFERENCE
        self.served = []

    def __call__(self, op):
        backend = next(b for b in self.backends if b.reason(op) is None)
        self.served.append((op_name(type(op)), backend.name))
        return backend(op)


def is_winograd(op, case):
    """Whether this is of a 3x3 convolution that Winograd's algorithm takes; "groups" may find one alone."""
    n, channels, height, width = case.shape
    one = case.form.startswith("groups") and channels % 4 != 0 and channels % 3 != 0
    form = one or case.form in ("3x3", "3x3_mask")
    image = torch.empty(n, 1, height, width, device="meta")
    summed = None if op == "conv_backward_weight" else channels + 2
    tile = winograd.tile_of(image, summed, winograd.LARGE)
    reason = winograd.reason(image, channels + 2, channels, tile)
    return form and case.dtype == torch.float32 and reason is None


def expected_backend(op, case):
    """Native wherever every activation that the op gets is dense channels_last."""
    if op in ("bn_backward_coefficients", "bn_scale_shift"):
        return "reference" if case.form == "half_weight" else "native"
    if op == "conv_backward_weight":
        dense = case.dtype in reasons.product_dtypes() and case.layout in ("channels_last", "offset")
        if is_winograd(op, case):
            return "native" if dense else "reference"
        many = case.shape[1] >= reasons.FEWEST_CHANNELS
        wide = case.form != "1x1" or case.shape[1] * (case.shape[1] + 2) >= reasons.FEWEST_WEIGHTS[case.dtype]
        grouped = case.form == "groups" and (case.shape[1] % 4 == 0 or case.shape[1] % 3 == 0)
        return "native" if dense and many and wide and not grouped else "reference"
    if op == "conv_backward_input":
        exact, dense = case.dtype == torch.float32, case.layout in ("channels_last", "offset")
        if is_winograd(op, case):
            masked = "mask" in case.form and case.shape[1] % 8 != 0
            return "native" if dense and not masked else "reference"
        summed = exact or (case.dtype in reasons.product_dtypes() and (case.shape[1] + 2) % 2 == 0)
        added = "identity" in case.form or (case.form == "1x1_mask" and case.shape[1] % 8 == 0)
        wanted = case.form.startswith("1x1") and (added or (exact and case.form == "1x1"))
        return "native" if dense and wanted and summed else "reference"
    several = "backward_" in op or "identity" in case.form or "projection" in case.form
    dense = ("channels_last", "offset") if several else ("channels_last", "offset", "expanded", "mixed")
    return "native" if case.layout in dense else "reference"


@pytest.mark.parametrize(("op", "case"), CASES)
def test_native(op, case):
    """In every dtype that it serves."""
    for dtype in DTYPES.values():
        ops, case = Recorder(), replace(case, dtype=dtype)
        CHECKS[op](ops, case)
        if op != "bn_layer":
            assert {name for called, name in ops.served if called == op} == {expected_backend(op, case)}


REUSED = [c for c in cases_of("bn_add_relu_forward") if "mask" not in c.form and c.layout == "channels_last"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", REUSED, ids=str)
def test_forward_into_the_storage_of_c(case, dtype):
    inputs = Inputs(replace(case, dtype=DTYPES[dtype]))
    c, v, residual, rv = forward_parts(inputs)
    args = v.scale, v.shift, residual, *((None, None) if rv is None else (rv.scale, rv.shift))
    relu = "no_relu" not in case.form
    expected, _ = functions.backend()(BnAddReluForward(c, *args, relu))
    y, mask = functions.backend()(BnAddReluForward(c, *args, relu, reuse_c=True))
    assert y is c and mask is None
    assert torch.equal(bits(y.contiguous()), bits(expected.contiguous()))


GIVEN_AWAY = [
    c
    for c in cases_of("bn_add_relu_backward_input")
    if c.form in ("mask", "relu", "relu_frozen", "no_relu") and c.layout == "channels_last"
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GIVEN_AWAY, ids=str)
def test_backward_into_the_storage_of_dy(case, dtype):
    inputs, ops = Inputs(replace(case, dtype=DTYPES[dtype])), functions.backend()
    dy, c, v, mask, _, _ = backward_parts(ops, inputs)
    grads = inputs.grads(v, c.numel() // c.shape[1], "frozen" in case.form)
    args = c, v, grads, mask, "no_relu" not in case.form
    expected, _ = ops(BnAddReluBackwardInput(dy, *args))
    dc, dresidual = ops(BnAddReluBackwardInput(dy, *args, reuse_dy=True))
    assert dc is dy and dresidual is None
    assert torch.equal(bits(dc.contiguous()), bits(expected.contiguous()))


OF_C = [c for c in cases_of("bn_add_relu_backward_input") if c.layout == "channels_last"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", OF_C, ids=str)
def test_backward_into_the_storage_of_c(case, dtype):
    inputs, ops = Inputs(replace(case, dtype=DTYPES[dtype])), functions.backend()
    dy, c, v, mask, _, shortcut_c = backward_parts(ops, inputs)
    rows, frozen = c.numel() // c.shape[1], "frozen" in case.form
    grads = inputs.grads(v, rows, frozen)
    shortcut_grads = None
    if shortcut_c is not None:
        shortcut_grads = inputs.grads(inputs.vectors(shortcut_c), rows, frozen)
    relu, save_dz = "no_relu" not in case.form, "identity" in case.form
    args = v, grads, mask, relu, shortcut_c, shortcut_grads, save_dz
    expected = ops(BnAddReluBackwardInput(dy, c, *args))
    found = ops(BnAddReluBackwardInput(dy, c, *args, reuse_c=True))
    assert found[0] is c and (shortcut_c is None or found[1] is shortcut_c)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(bits(a.contiguous()), bits(b.contiguous()))


def test_autograd_sees_what_is_written_in_place():
    """A tensor that autograd has kept and a kernel has written into is an error, not a wrong gradient."""
    ops, inputs = functions.backend(), Inputs(Case("kept", (2, 16, 5, 7)))
    _, _, v, _, _, _ = backward_parts(ops, inputs)
    grads, weight = inputs.grads(v, 70), torch.ones(16, 16, 1, 1)
    writes = {
        "forward": lambda a, b, c: ops(BnAddReluForward(a, v.scale, v.shift, reuse_c=True)),
        "backward into dy": lambda a, b, c: ops(BnAddReluBackwardInput(a, b, v, grads, reuse_dy=True)),
        "backward into c": lambda a, b, c: ops(BnAddReluBackwardInput(b, a, v, grads, reuse_c=True)),
        "backward into shortcut_c": lambda a, b, c: ops(
            BnAddReluBackwardInput(b, c, v, grads, shortcut_c=a, shortcut_grads=grads, reuse_c=True)
        ),
        "gradient onto the shortcut's": lambda a, b, c: ops(
            ConvBackwardInput(b, c, weight, (1, 1), (0, 0), (1, 1), 1, a, reuse_shortcut=True)
        ),
    }
    for name, write in writes.items():
        x, *others = (inputs.c().clone() for _ in range(3))
        kept = x.requires_grad_() * 2
        squared = kept.square()
        before = bits(kept.detach().clone())
        with torch.no_grad():
            write(kept, *others)
        assert not torch.equal(bits(kept.detach()), before), f"{name}: nothing was written"
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squared.sum().backward()


def test_nothing_is_given_away_where_it_is_still_needed():
    """With a mask to take or a second result to give, both stay."""
    ops, inputs = functions.backend(), Inputs(Case("kept"))
    dy, c, v, _, _, _ = backward_parts(ops, inputs)
    y, mask = ops(BnAddReluForward(c, v.scale, v.shift, save_mask=True, reuse_c=True))
    assert y is not c and mask is not None
    dc, dz = ops(
        BnAddReluBackwardInput(dy, c, v, inputs.grads(v, 70), mask, False, save_dz=True, reuse_dy=True)
    )
    assert dc is not dy and dz is not dy
    inputs.assert_unchanged("bn_add_relu_forward, bn_add_relu_backward_input")


@pytest.mark.parametrize("stride", [9, 2**31, 2**32 + 2])
def test_a_stride_beyond_the_image_pools_one_window(stride):
    """The kernels count strides in 32 bits: in these, 2^32 + 2 would be the stride 2."""
    ops = functions.backend()
    c = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    scale, shift = torch.ones(8), torch.zeros(8)
    forward = BnReluMaxpoolForward(c, scale, shift, 3, stride, 1)
    y, indices = ops(forward)
    expected, places = REFERENCE(forward._replace(stride=9))
    assert y.shape == (2, 8, 1, 1) and torch.equal(y, expected) and torch.equal(indices, places)
    grads = BatchNormGrads(scale, shift, scale, None, None)
    backward = BnReluMaxpoolBackwardInput(torch.randn_like(y), indices, c, grads, 3, stride, 1)
    assert torch.equal(ops(backward), REFERENCE(backward._replace(stride=9)))
