"""The native kernels of convolutions on the CPU: weight gradients, and products of 1x1 convolutions both ways."""

from dataclasses import replace

import conv1x1_cases
import conv1x1_checks
import pytest
import torch
from raw_op_cases import Case, bits, cases_of
from raw_op_checks import CHECKS
from test_native_ops import Recorder

from fusedres.ops.contract import Conv1x1Forward, ConvBackwardInput, ConvBackwardWeight
from fusedres.ops.dispatch import dispatcher
from fusedres.ops.native import functions, library, reasons, winograd

pytestmark = pytest.mark.skipif(not library.is_built(), reason="no compiled library in this installation")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """3x3 convolutions by the kernels that sum all products, not by Winograd's algorithm."""
    monkeypatch.setenv(winograd.ENVIRONMENT_VARIABLE, "0")


def product_dtypes():
    found = reasons.product_dtypes() if library.is_built() else ()
    absent = pytest.mark.skip(reason="no products of bfloat16 on this processor")
    return [pytest.param(d, id=n, marks=() if d in found else absent) for n, d in DTYPES.items()]


WEIGHT_GRADIENTS = [c for c in cases_of("conv_backward_weight") if c.layout in ("channels_last", "offset")]


@pytest.mark.parametrize("dtype", product_dtypes())
@pytest.mark.parametrize("case", [c for c in WEIGHT_GRADIENTS if c.form != "groups"], ids=str)
def test_weight_gradient_kernel_of_any_size(case, dtype):
    CHECKS["conv_backward_weight"](functions.backend(), replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", product_dtypes())
@pytest.mark.parametrize("shape", [(5, 150, 20, 31), (3, 66, 37, 7)], ids=str)
@pytest.mark.parametrize("form", ["3x3", "3x3s2", "1x1", "1x1s2", "5x3"])
def test_weight_gradient_kernel_of_more_than_it_copies_at_once(form, shape, dtype):
    """Of positions, which pieces share that end inside an image, and of input channels."""
    first = next(c for c in WEIGHT_GRADIENTS if c.form == form)
    case = replace(first, id="large", shape=shape, layout="channels_last", dtype=dtype)
    CHECKS["conv_backward_weight"](functions.backend(), case)


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
            found.append(functions.backend()(ConvBackwardWeight(dy, x, *window)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


def test_weight_gradient_is_left_to_the_library_where_threads_would_have_little_to_do():
    dy, x = (torch.randn(1, 64, n, n).contiguous(memory_format=torch.channels_last) for n in (9, 18))
    args = dy, x, (3, 3), (2, 2), (1, 1), (1, 1), 1
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(18)
        assert functions.backend().reason(ConvBackwardWeight(*args)) is None
        torch.set_num_threads(19)
        assert functions.backend().reason(ConvBackwardWeight(*args)) == "too_many_threads"
    finally:
        torch.set_num_threads(threads)


ALONE = ("raw", "stride2_stats")  # in training
EPILOGUES = ("projection", "identity_no_relu", "affine", "raw")
PRODUCTS = [c for c in conv1x1_cases.cases_of("conv1x1_forward") if c.form in (*EPILOGUES, *ALONE)]
PRODUCTS += [
    replace(c, form=f"stride2_{c.form}")
    for c in PRODUCTS
    if c.id in ("P128", "P1100", "N0", "offset") and c.form not in ALONE
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_product_with_its_epilogue(case, dtype, monkeypatch):
    """A 1x1 convolution of inference, or alone: by the kernel wherever the activations are dense channels_last."""
    monkeypatch.setattr(reasons, "FEWEST_SUMMED", 1)
    monkeypatch.setattr(reasons, "FEWEST_ALONE", 1)
    ops, case = Recorder(), replace(case, dtype=DTYPES[dtype])
    conv1x1_checks.CHECKS["conv1x1_forward"](ops, case)
    dense = case.layout in ("channels_last", "offset")
    single = case.form in ALONE or case.form.endswith("affine")
    dense = dense or (single and case.layout in ("mixed", "expanded"))
    half = case.dtype == torch.bfloat16
    served_half = case.dtype in reasons.product_dtypes() and case.shape[1] % 2 == 0 and case.form not in ALONE
    dense = dense and (served_half or not half)
    served = {name for op, name in ops.served if op == "conv1x1_forward"}
    assert served == {"native" if dense else "reference"}


@pytest.mark.parametrize("dtype", product_dtypes())
@pytest.mark.parametrize("form", EPILOGUES)
def test_product_of_more_than_it_sums_at_once(form, dtype):
    for given in (form, f"stride2_{form}"):
        case = conv1x1_cases.ConvCase("large", (2, 1030, 15, 17), cout=150, form=given, dtype=dtype)
        conv1x1_checks.CHECKS["conv1x1_forward"](functions.backend(), case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(16, 9, 1, 1)}, r"weight is \[16, 9, 1, 1\], needed \[Cout, 8, 1, 1\]"),
        ({"x": torch.zeros(2, 8, 5, 5, dtype=torch.bfloat16)}, "weight is float32, needed bfloat16"),
        ({"scale": torch.zeros(8)}, r"scale is \[8\], needed contiguous \[16\]"),
        ({"residual": torch.zeros(2, 16, 5, 6)}, r"residual is \[2, 16, 5, 6\]"),
        ({"residual_shift": None}, "residual_scale, residual_shift is given in part"),
        ({"residual": None}, "residual_scale is without residual"),
        ({"stride": 2}, r"residual is \[2, 16, 5, 5\], needed \[2, 16, 3, 3\]"),
        (
            {"bias": torch.zeros(16)},
            "the call is another form, needed no bias, prologue, mask and statistics",
        ),
        ({"scale": None, "shift": None}, "residual and relu after scale alone"),
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
        if isinstance(value, torch.Tensor) and value.dim() == 4:
            args[name] = value.contiguous(memory_format=torch.channels_last)
    library.load()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedres_native.conv1x1_forward(**args, relu=True)


@pytest.mark.parametrize("wanted", ["save_mask", "save_stats"])
def test_product_of_which_more_is_wanted_is_left_to_another_backend(wanted):
    """The kernel would leave it out."""
    x, weight = (
        torch.randn(2, 16, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(8, 16, 1, 1),
    )
    op, ops = Conv1x1Forward(x, weight, scale=torch.rand(8), shift=torch.rand(8)), dispatcher("native")
    assert ops.serving(op).name == "native"
    out = ops(op._replace(**{wanted: True}))
    assert (out.mask if wanted == "save_mask" else out.mean) is not None


def test_products_without_results_come_to_an_end():
    library.load()
    ops, x, none = torch.ops.fusedres_native, torch.zeros(2, 8, 5, 5), torch.zeros(0)
    x = x.contiguous(memory_format=torch.channels_last)
    y, *_ = ops.conv1x1_forward(x, torch.zeros(0, 8, 1, 1), scale=none, shift=none, relu=True)
    dx = ops.conv_backward_input(x, torch.zeros(8, 0, 1, 1), None, None)
    assert y.shape == dx.shape == (2, 0, 5, 5)


def test_products_of_bfloat16_say_what_they_need():
    library.load()
    vector = torch.zeros(16)
    x, weight = torch.zeros(2, 7, 5, 5), torch.zeros(16, 7, 1, 1)
    x, weight = (t.to(torch.bfloat16, memory_format=torch.channels_last) for t in (x, weight))
    wanted = "x is 7 channels, needed an even number"
    if torch.bfloat16 not in reasons.product_dtypes():
        wanted = "x is bfloat16, needed float32 on this processor"
    with pytest.raises(RuntimeError, match=wanted):
        torch.ops.fusedres_native.conv1x1_forward(x, weight, scale=vector, shift=vector)


INPUT_GRADIENTS = ("1x1_mask", "1x1_identity", "1x1", "1x1s2_identity")


@pytest.mark.parametrize("dtype", product_dtypes())
@pytest.mark.parametrize("form", INPUT_GRADIENTS)
def test_input_gradient_kernel_of_more_than_it_multiplies_at_once(form, dtype):
    """Of positions, of input and of output channels, none of them in whole tiles."""
    case = Case("large", (2, 600, 11, 13), form=form, dtype=dtype)
    CHECKS["conv_backward_input"](functions.backend(), case)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", product_dtypes())
def test_input_gradient_into_the_storage_of_another(dtype, stride):
    x, shortcut = (torch.randn(3, 24, 9, 7).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(40, 24, 1, 1).to(x.dtype, memory_format=torch.channels_last)
    dy = torch.randn(3, 40, -(-9 // stride), -(-7 // stride))
    dy = dy.to(x.dtype, memory_format=torch.channels_last)
    args = dy, x, weight, (stride, stride), (0, 0), (1, 1), 1, shortcut
    expected = functions.backend()(ConvBackwardInput(*args))
    assert expected is not shortcut
    dx = functions.backend()(ConvBackwardInput(*args, reuse_shortcut=True))
    assert dx is shortcut and torch.equal(bits(dx.contiguous()), bits(expected.contiguous()))


def test_input_gradient_does_not_depend_on_the_number_of_threads():
    dy, x = (torch.randn(4, c, 30, 30).contiguous(memory_format=torch.channels_last) for c in (72, 96))
    weight = torch.randn(72, 96, 1, 1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 16):
            torch.set_num_threads(count)
            found.append(functions.backend()(ConvBackwardInput(dy, x, weight, (1, 1), (0, 0), (1, 1), 1)))
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
        if isinstance(value, torch.Tensor) and value.dim() == 4:
            args[name] = value.contiguous(memory_format=torch.channels_last)
    args.setdefault(
        "shortcut_mask", torch.zeros(-(-2 * args["weight"].shape[1] * 25 // 8), dtype=torch.uint8)
    )
    library.load()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedres_native.conv_backward_input(**args)


def test_input_gradient_in_place_says_what_is_wrong():
    library.load()
    dx, dy = (torch.zeros(2, c, 5, 5).contiguous(memory_format=torch.channels_last) for c in (16, 8))
    with pytest.raises(
        RuntimeError, match=r"dy is \[2, 8, 5, 5\], needed the output's shape, 3 along dimension 2"
    ):
        torch.ops.fusedres_native.conv_backward_input_(dx, dy, torch.zeros(8, 16, 1, 1), 2, 2)
    with pytest.raises(RuntimeError, match=r"dx is \[2, 15, 5, 5\], needed 16 channels"):
        torch.ops.fusedres_native.conv_backward_input_(
            dx[:, :15].contiguous(memory_format=torch.channels_last), dy, torch.zeros(8, 16, 1, 1), 1, 1
        )


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
        functions.backend()(ConvBackwardWeight(dy, x, (3, 3), args["stride"], (1, 1), args["dilation"], 1))
