"""The native backend on the CPU, by the checks that every backend has to pass."""

from dataclasses import replace

import conv1x1_cases
import conv1x1_checks
import pytest
import torch
from raw_op_cases import Case, Inputs, bits, cases_of
from raw_op_checks import CHECKS, backward_parts, forward_parts

from fusedres.backends import native, native_reasons
from fusedres.backends.reference import ReferenceOps
from fusedres.dispatch import dispatcher

pytestmark = pytest.mark.skipif(not native.is_built(), reason="no compiled library in this installation")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [pytest.param(op, case, id=f"{op}-{case}") for op in CHECKS for case in cases_of(op)]


def product_dtypes():
    found = native_reasons.product_dtypes() if native.is_built() else ()
    absent = pytest.mark.skip(reason="no products of bfloat16 on this processor")
    return [pytest.param(d, id=n, marks=() if d in found else absent) for n, d in DTYPES.items()]


class Recorder:
    """The native ops, then the reference; remembers which of them served each call."""

    def __init__(self):
        self.backends = native.NativeOps(), ReferenceOps()
        self.served = []

    def __getattr__(self, op):
        def call(*args):
            backend = next(b for b in self.backends if b.supports(op, *args) is None)
            self.served.append((op, backend.name))
            return getattr(backend, op)(*args)

        return call


def expected_backend(op, case):
    """Native wherever every activation that the op gets is dense channels_last."""
    if op in ("bn_backward_coefficients", "bn_scale_shift"):
        return "reference" if case.form == "half_weight" else "native"
    if op == "conv_bias_add_relu_forward" and (
        case.id == "N0" or case.dtype not in native_reasons.fused_convolution_dtypes()
    ):
        return "reference"
    if op == "conv_backward_weight":
        dense = case.dtype in native_reasons.product_dtypes() and case.layout in ("channels_last", "offset")
        many = case.shape[1] >= native_reasons.FEWEST_CHANNELS
        wide = (
            case.form != "1x1"
            or case.shape[1] * (case.shape[1] + 2) >= native_reasons.FEWEST_WEIGHTS[case.dtype]
        )
        grouped = case.form == "groups" and (case.shape[1] % 4 == 0 or case.shape[1] % 3 == 0)
        return "native" if dense and many and wide and not grouped else "reference"
    if op == "conv_backward_input":
        exact, dense = case.dtype == torch.float32, case.layout in ("channels_last", "offset")
        summed = exact or (case.dtype in native_reasons.product_dtypes() and (case.shape[1] + 2) % 2 == 0)
        added = "identity" in case.form or (case.form == "1x1_mask" and case.shape[1] % 8 == 0)
        wanted = case.form.startswith("1x1") and (added or (exact and case.form == "1x1"))
        return "native" if dense and wanted and summed else "reference"
    kernel3 = case.form in ("3x3s2", "groups", "dilation")  # these have a residual too
    one_position = case.shape[2:] == (1, 1)  # dense in both formats
    if op == "conv_bias_add_relu_forward" and one_position and (kernel3 or "identity" in case.form):
        return "reference"
    several = kernel3 or "backward_" in op or "identity" in case.form or "projection" in case.form
    dense = ("channels_last", "offset") if several else ("channels_last", "offset", "expanded", "mixed")
    return "native" if case.layout in dense else "reference"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_native(op, case, dtype):
    ops, case = Recorder(), replace(case, dtype=DTYPES[dtype])
    CHECKS[op](ops, case)
    if op != "bn_layer":
        assert {name for called, name in ops.served if called == op} == {expected_backend(op, case)}


WEIGHT_GRADIENTS = [c for c in cases_of("conv_backward_weight") if c.layout in ("channels_last", "offset")]


@pytest.mark.parametrize("dtype", product_dtypes())
@pytest.mark.parametrize("case", [c for c in WEIGHT_GRADIENTS if c.form != "groups"], ids=str)
def test_weight_gradient_kernel_of_any_size(case, dtype):
    CHECKS["conv_backward_weight"](native.NativeOps(), replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", product_dtypes())
@pytest.mark.parametrize("shape", [(5, 150, 20, 31), (3, 66, 37, 7)], ids=str)
@pytest.mark.parametrize("form", ["3x3", "3x3s2", "1x1", "1x1s2", "5x3"])
def test_weight_gradient_kernel_of_more_than_it_copies_at_once(form, shape, dtype):
    """Of positions, which pieces share that end inside an image, and of input channels."""
    first = next(c for c in WEIGHT_GRADIENTS if c.form == form)
    case = replace(first, id="large", shape=shape, layout="channels_last", dtype=dtype)
    CHECKS["conv_backward_weight"](native.NativeOps(), case)


@pytest.mark.parametrize("dtype", product_dtypes())
@pytest.mark.parametrize("window", [((3, 3), (1, 1), (1, 1), (1, 1), 1), ((1, 1), (1, 1), (0, 0), (1, 1), 1)])
@pytest.mark.parametrize("cin", [64, 72])
def test_weight_gradient_does_not_depend_on_the_number_of_threads(cin, window, dtype):
    """Shared by output channels alone, by input channels as well, and by taps as well."""
    dy, x = (torch.randn(2, c, 9, 9).to(dtype, memory_format=torch.channels_last) for c in (96, cin))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 8, 16, 24):
            torch.set_num_threads(count)
            found.append(native.NativeOps().conv_backward_weight(dy, x, *window))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


def test_weight_gradient_is_left_to_the_library_where_threads_would_have_little_to_do():
    dy, x = (torch.randn(1, 64, n, n).contiguous(memory_format=torch.channels_last) for n in (9, 18))
    args = dy, x, (3, 3), (2, 2), (1, 1), (1, 1), 1
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(18)
        assert native.NativeOps().supports("conv_backward_weight", *args) is None
        torch.set_num_threads(19)
        assert native.NativeOps().supports("conv_backward_weight", *args) == "too_many_threads"
    finally:
        torch.set_num_threads(threads)


EPILOGUES = ("projection", "identity_no_relu", "affine")
PRODUCTS = [c for c in conv1x1_cases.cases_of("conv1x1_forward") if c.form in EPILOGUES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_product_with_its_epilogue(case, dtype, monkeypatch):
    """A 1x1 convolution of inference: by the kernel wherever the activations are dense channels_last."""
    monkeypatch.setattr(native_reasons, "FEWEST_SUMMED", 1)
    ops, case = Recorder(), replace(case, dtype=DTYPES[dtype])
    conv1x1_checks.CHECKS["conv1x1_forward"](ops, case)
    dense = case.layout in ("channels_last", "offset")
    dense = dense or (case.form == "affine" and case.layout in ("mixed", "expanded"))
    half = case.dtype == torch.bfloat16
    dense = dense and not (half and (case.dtype not in native_reasons.product_dtypes() or case.shape[1] % 2))
    served = {name for op, name in ops.served if op == "conv1x1_forward"}
    assert served == {"native" if dense else "reference"}


@pytest.mark.parametrize("dtype", product_dtypes())
@pytest.mark.parametrize("form", EPILOGUES)
def test_product_of_more_than_it_sums_at_once(form, dtype):
    case = conv1x1_cases.Conv1x1Case("large", (2, 1030, 7, 9), cout=150, form=form, dtype=dtype)
    conv1x1_checks.CHECKS["conv1x1_forward"](native.NativeOps(), case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(16, 9, 1, 1)}, r"weight is \[16, 9, 1, 1\], needed \[Cout, 8, 1, 1\]"),
        ({"x": torch.zeros(2, 8, 5, 5, dtype=torch.bfloat16)}, "weight is float32, needed bfloat16"),
        ({"scale": torch.zeros(8)}, r"scale is \[8\], needed contiguous \[16\]"),
        ({"residual": torch.zeros(2, 16, 5, 6)}, r"residual is \[2, 16, 5, 6\]"),
        ({"residual_shift": None}, "residual_scale, residual_shift is given in part"),
        ({"residual": None}, "residual_scale is without residual"),
    ],
)
def test_product_says_what_is_wrong(change, message):
    vector = torch.zeros(16)
    args = {
        "x": torch.zeros(2, 8, 5, 5),
        "weight": torch.zeros(16, 8, 1, 1),
        "scale": vector,
        "shift": vector,
        "residual": torch.zeros(2, 16, 5, 5),
        "residual_scale": vector,
        "residual_shift": vector,
    } | change
    for name, value in args.items():
        if value is not None and value.dim() == 4:
            args[name] = value.contiguous(memory_format=torch.channels_last)
    native.load()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedres_native.conv1x1_forward(**args, relu=True)


@pytest.mark.parametrize("wanted", ["save_mask", "save_stats"])
def test_product_of_which_more_is_wanted_is_left_to_another_backend(wanted):
    """Also where that is asked for by keyword: the kernel would leave it out."""
    x, weight = (
        torch.randn(2, 16, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(8, 16, 1, 1),
    )
    args = x, weight, None, 1, None, None, torch.rand(8), torch.rand(8)
    assert dispatcher("native").serving("conv1x1_forward", *args) == "native"
    out = dispatcher("native").conv1x1_forward(*args, **{wanted: True})
    assert (out.mask if wanted == "save_mask" else out.mean) is not None


def test_products_without_results_come_to_an_end():
    native.load()
    ops, x, none = torch.ops.fusedres_native, torch.zeros(2, 8, 5, 5), torch.zeros(0)
    x = x.contiguous(memory_format=torch.channels_last)
    y = ops.conv1x1_forward(x, torch.zeros(0, 8, 1, 1), none, none, None, None, None, True)
    dx = ops.conv_backward_input(x, torch.zeros(8, 0, 1, 1), None, None)
    assert y.shape == dx.shape == (2, 0, 5, 5)


def test_products_of_bfloat16_say_what_they_need():
    native.load()
    vector = torch.zeros(16)
    x, weight = torch.zeros(2, 7, 5, 5), torch.zeros(16, 7, 1, 1)
    x, weight = (t.to(torch.bfloat16, memory_format=torch.channels_last) for t in (x, weight))
    wanted = "x is 7 channels, needed an even number"
    if torch.bfloat16 not in native_reasons.product_dtypes():
        wanted = "x is bfloat16, needed float32 on this processor"
    with pytest.raises(RuntimeError, match=wanted):
        torch.ops.fusedres_native.conv1x1_forward(x, weight, vector, vector, None, None, None, True)


INPUT_GRADIENTS = ("1x1_mask", "1x1_identity", "1x1", "1x1s2_identity")


@pytest.mark.parametrize("dtype", product_dtypes())
@pytest.mark.parametrize("form", INPUT_GRADIENTS)
def test_input_gradient_kernel_of_more_than_it_multiplies_at_once(form, dtype):
    """Of positions, of input and of output channels, none of them in whole tiles."""
    case = Case("large", (2, 600, 11, 13), form=form, dtype=dtype)
    CHECKS["conv_backward_input"](native.NativeOps(), case)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", product_dtypes())
def test_input_gradient_into_the_storage_of_another(dtype, stride):
    x, shortcut = (torch.randn(3, 24, 9, 7).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(40, 24, 1, 1).to(x.dtype, memory_format=torch.channels_last)
    dy = torch.randn(3, 40, -(-9 // stride), -(-7 // stride))
    dy = dy.to(x.dtype, memory_format=torch.channels_last)
    args = dy, x, weight, (stride, stride), (0, 0), (1, 1), 1, shortcut
    expected = native.NativeOps().conv_backward_input(*args)
    assert expected is not shortcut
    dx = native.NativeOps().conv_backward_input(*args, reuse_shortcut=True)
    assert dx is shortcut and torch.equal(bits(dx.contiguous()), bits(expected.contiguous()))


def test_input_gradient_does_not_depend_on_the_number_of_threads():
    dy, x = (torch.randn(4, c, 30, 30).contiguous(memory_format=torch.channels_last) for c in (72, 96))
    weight = torch.randn(72, 96, 1, 1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 16):
            torch.set_num_threads(count)
            found.append(native.NativeOps().conv_backward_input(dy, x, weight, (1, 1), (0, 0), (1, 1), 1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(8, 16, 3, 3)}, r"weight is \[8, 16, 3, 3\], needed \[8, Cin, 1, 1\]"),
        ({"weight": torch.zeros(9, 16, 1, 1)}, r"weight is \[9, 16, 1, 1\]"),
        ({"weight": torch.zeros(8, 16, 1, 1).double()}, "weight is float64, needed float32"),
        ({"dy": torch.zeros(2, 8, 5, 5, dtype=torch.bfloat16)}, "weight is float32, needed bfloat16"),
        ({"shortcut_dy": torch.zeros(2, 16, 5, 6)}, r"shortcut_dy is \[2, 16, 5, 6\]"),
        (
            {"shortcut_mask": torch.zeros(3, dtype=torch.uint8)},
            r"mask is uint8 \[3\], needed contiguous uint8 \[100\]",
        ),
        ({"shortcut_dy": None}, "shortcut_mask is without shortcut_dy"),
        ({"weight": torch.zeros(8, 12, 1, 1), "shortcut_dy": torch.zeros(2, 12, 5, 5)}, "12 bits a position"),
    ],
)
def test_input_gradient_says_what_is_wrong(change, message):
    args = {
        "dy": torch.zeros(2, 8, 5, 5),
        "weight": torch.zeros(8, 16, 1, 1),
        "shortcut_dy": torch.zeros(2, 16, 5, 5),
    } | change
    for name, value in args.items():
        if value is not None and value.dim() == 4:
            args[name] = value.contiguous(memory_format=torch.channels_last)
    args.setdefault(
        "shortcut_mask", torch.zeros(-(-2 * args["weight"].shape[1] * 25 // 8), dtype=torch.uint8)
    )
    native.load()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedres_native.conv_backward_input(**args)


def test_input_gradient_in_place_says_what_is_wrong():
    native.load()
    dx, dy = (torch.zeros(2, c, 5, 5).contiguous(memory_format=torch.channels_last) for c in (16, 8))
    with pytest.raises(
        RuntimeError, match=r"dy is \[2, 8, 5, 5\], needed the output's shape, 3 along dimension 2"
    ):
        torch.ops.fusedres_native.conv_backward_input_(dx, dy, torch.zeros(8, 16, 1, 1), 2, 2)
    with pytest.raises(RuntimeError, match=r"dx is \[2, 15, 5, 5\], needed 16 channels"):
        torch.ops.fusedres_native.conv_backward_input_(
            dx[:, :15].contiguous(memory_format=torch.channels_last), dy, torch.zeros(8, 16, 1, 1), 1, 1
        )


REUSED = [c for c in cases_of("bn_add_relu_forward") if "mask" not in c.form and c.layout == "channels_last"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", REUSED, ids=str)
def test_forward_into_the_storage_of_c(case, dtype):
    inputs = Inputs(replace(case, dtype=DTYPES[dtype]))
    c, v, residual, rv = forward_parts(inputs)
    args = v.scale, v.shift, residual, *((None, None) if rv is None else (rv.scale, rv.shift))
    relu = "no_relu" not in case.form
    expected, _ = native.NativeOps().bn_add_relu_forward(c, *args, relu)
    y, mask = native.NativeOps().bn_add_relu_forward(c, *args, relu, reuse_c=True)
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
    inputs, ops = Inputs(replace(case, dtype=DTYPES[dtype])), native.NativeOps()
    dy, c, v, mask, _, _ = backward_parts(ops, inputs)
    grads = inputs.grads(v, c.numel() // c.shape[1], "frozen" in case.form)
    args = c, v, grads, mask, "no_relu" not in case.form
    expected, _ = ops.bn_add_relu_backward_input(dy, *args)
    dc, dresidual = ops.bn_add_relu_backward_input(dy, *args, reuse_dy=True)
    assert dc is dy and dresidual is None
    assert torch.equal(bits(dc.contiguous()), bits(expected.contiguous()))


OF_C = [c for c in cases_of("bn_add_relu_backward_input") if c.layout == "channels_last"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", OF_C, ids=str)
def test_backward_into_the_storage_of_c(case, dtype):
    inputs, ops = Inputs(replace(case, dtype=DTYPES[dtype])), native.NativeOps()
    dy, c, v, mask, _, shortcut_c = backward_parts(ops, inputs)
    rows, frozen = c.numel() // c.shape[1], "frozen" in case.form
    grads = inputs.grads(v, rows, frozen)
    shortcut_grads = None
    if shortcut_c is not None:
        shortcut_grads = inputs.grads(inputs.vectors(shortcut_c), rows, frozen)
    relu, save_dz = "no_relu" not in case.form, "identity" in case.form
    args = v, grads, mask, relu, shortcut_c, shortcut_grads, save_dz
    expected = ops.bn_add_relu_backward_input(dy, c, *args)
    found = ops.bn_add_relu_backward_input(dy, c, *args, reuse_c=True)
    assert found[0] is c and (shortcut_c is None or found[1] is shortcut_c)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(bits(a.contiguous()), bits(b.contiguous()))


def test_autograd_sees_what_is_written_in_place():
    """A tensor that autograd has kept and a kernel has written into is an error, not a wrong gradient."""
    ops, inputs = native.NativeOps(), Inputs(Case("kept", (2, 16, 5, 7)))
    _, _, v, _, _, _ = backward_parts(ops, inputs)
    grads, weight = inputs.grads(v, 70), torch.ones(16, 16, 1, 1)
    writes = {
        "forward": lambda a, b, c: ops.bn_add_relu_forward(a, v.scale, v.shift, reuse_c=True),
        "backward into dy": lambda a, b, c: ops.bn_add_relu_backward_input(a, b, v, grads, reuse_dy=True),
        "backward into c": lambda a, b, c: ops.bn_add_relu_backward_input(b, a, v, grads, reuse_c=True),
        "backward into shortcut_c": lambda a, b, c: ops.bn_add_relu_backward_input(
            b, c, v, grads, shortcut_c=a, shortcut_grads=grads, reuse_c=True
        ),
        "gradient onto the shortcut's": lambda a, b, c: ops.conv_backward_input(
            b, c, weight, (1, 1), (0, 0), (1, 1), 1, a, reuse_shortcut=True
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
    ops, inputs = native.NativeOps(), Inputs(Case("kept"))
    dy, c, v, _, _, _ = backward_parts(ops, inputs)
    y, mask = ops.bn_add_relu_forward(c, v.scale, v.shift, save_mask=True, reuse_c=True)
    assert y is not c and mask is not None
    dc, dz = ops.bn_add_relu_backward_input(
        dy, c, v, inputs.grads(v, 70), mask, False, save_dz=True, reuse_dy=True
    )
    assert dc is not dy and dz is not dy
    inputs.assert_unchanged("bn_add_relu_forward, bn_add_relu_backward_input")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dy": torch.zeros(2, 8, 3, 3)},
            r"dy is \[2, 8, 3, 3\], needed the output's shape, 5 along dimension 2",
        ),
        ({"dy": torch.zeros(1, 8, 5, 5)}, r"dy is \[1, 8, 5, 5\]"),
        ({"x": torch.zeros(2, 4, 5, 5, dtype=torch.bfloat16)}, "dy is float32, needed bfloat16"),
        ({"stride": (0, 1)}, "stride 0"),
        ({"dilation": (1, 0)}, "dilation 0"),
    ],
)
def test_weight_gradient_says_what_is_wrong(change, message):
    args = {"dy": torch.zeros(2, 8, 5, 5), "x": torch.zeros(2, 4, 5, 5), "stride": (1, 1), "dilation": (1, 1)}
    args |= change
    dy, x = (args[k].contiguous(memory_format=torch.channels_last) for k in ("dy", "x"))
    with pytest.raises(RuntimeError, match=message):
        native.NativeOps().conv_backward_weight(dy, x, (3, 3), args["stride"], (1, 1), args["dilation"], 1)
