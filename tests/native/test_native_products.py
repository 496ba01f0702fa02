"""Which convolutions on a GPU the native backend serves, asked of tensors without values."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fusedres.ops.backend import REASONS
from fusedres.ops.contract import (
    BatchNormGrads,
    BatchNormVectors,
    Conv1x1BackwardInput,
    Conv1x1BackwardWeight,
    Conv1x1Forward,
    Conv1x1GramBackwardInput,
    Conv3x3BackwardInput,
    Conv3x3Forward,
    Gram,
    GramBackwardCoefficients,
    GramOutputStats,
)
from fusedres.ops.dispatch import AUTO_LOADERS, dispatcher
from fusedres.ops.native import functions, library, products, reasons

pytestmark = pytest.mark.skipif(not library.is_built(), reason="no compiled library in this installation")


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Tensors of a GPU that the library has code for."""
    monkeypatch.setattr(reasons, "device_reason", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    products.is_measured.cache_clear()
    with FakeTensorMode():
        yield
    products.is_measured.cache_clear()


def image(channels, *, batch=2, dtype=torch.bfloat16):
    strides = channels * 35, 1, channels * 7, channels
    return torch.empty_strided((batch, channels, 5, 7), strides, dtype=dtype, device="cuda")


def weight(cout, cin, dtype=torch.bfloat16):
    return torch.empty(cout, cin, 1, 1, dtype=dtype, device="cuda")


def vector(length, dtype=torch.float32):
    return torch.empty(length, dtype=dtype, device="cuda")


def strided(shape, strides, dtype=torch.bfloat16):
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


def forward(**changes):
    """A call with every optional part, changed."""
    v, u = vector(17), vector(33)
    scales = {"in_scale": v, "in_shift": v, "scale": u, "shift": u, "residual_scale": u, "residual_shift": u}
    op = Conv1x1Forward(image(17), weight(33, 17), vector(33, torch.bfloat16), residual=image(33), **scales)
    return op._replace(**changes)


def backward_input(**changes):
    v, g = BatchNormVectors(*[vector(33)] * 5), BatchNormGrads(*[vector(33)] * 5)
    mask = torch.empty(2 * 17 * 35, dtype=torch.uint8, device="cuda")
    op = Conv1x1BackwardInput(image(33), image(33), v, g, weight(33, 17), True, image(17), mask)
    return op._replace(**changes)


def backward_weight(**changes):
    mask = torch.empty(2 * 33 * 35, dtype=torch.uint8, device="cuda")
    op = Conv1x1BackwardWeight(image(33), mask, image(17), *[vector(17)] * 3)
    return op._replace(**changes)


def output_stats(**changes):
    S = torch.empty(17, 17, device="cuda")
    return GramOutputStats(weight(33, 17), vector(33, torch.bfloat16), vector(17), S)._replace(**changes)


def coefficients(**changes):
    r, S = torch.empty(33, 17, device="cuda"), torch.empty(17, 17, device="cuda")
    v = BatchNormVectors(*[vector(33)] * 5)
    bias = vector(33, torch.bfloat16)
    moments = vector(17), S, vector(17)
    op = GramBackwardCoefficients(r, vector(33), weight(33, 17), bias, v, 70, *moments)
    return op._replace(**changes)


def gram_backward_input(**changes):
    mask = torch.empty(2 * 33 * 35, dtype=torch.uint8, device="cuda")
    weights = torch.empty(33, 17, device="cuda"), torch.empty(17, 17, device="cuda")
    v = BatchNormVectors(*[vector(17)] * 5)
    op = Conv1x1GramBackwardInput(image(33), mask, image(17), v, *weights, vector(17), vector(17))
    return op._replace(**changes)


FROZEN = {"m": None, "S": None, "center": None}
FROZEN_INPUT = {"weight_a": None, "center": None, "offset": None}


def backward_input3x3(**changes):
    v, g = BatchNormVectors(*[vector(33)] * 5), BatchNormGrads(*[vector(33)] * 5)
    mask = torch.empty(2 * 17 * 35, dtype=torch.uint8, device="cuda")
    window = torch.empty(33, 17, 3, 3, dtype=torch.bfloat16, device="cuda")  # in any memory format
    op = Conv3x3BackwardInput(image(33), image(17), window, 1, image(33), v, g, True, image(17), mask)
    return op._replace(**changes)


def test_products_take_any_number_of_channels_and_what_comes_with_them():
    backend = functions.backend()
    for changes in ({}, {"save_mask": True}, {"save_stats": True}, {"relu": True}, {"bias": None}):
        assert backend.reason(forward(**changes)) is None
    window = torch.empty(33, 17, 3, 3, dtype=torch.bfloat16, device="cuda")  # in any memory format
    for stride in (1, 2):
        assert backend.reason(Conv3x3Forward(image(17), window, stride, save_mask=True)) is None
    frozen = BatchNormGrads(*[vector(33)] * 3, None, None)
    for changes in (
        {},
        {"grads": frozen},
        {"shortcut_mask": None},
        {"shortcut_dy": None, "shortcut_mask": None},
    ):
        assert backend.reason(backward_input(**changes)) is None
    for changes in (
        {},
        {"grads": frozen},
        {"c": None, "vectors": None, "grads": None},
        {"shortcut_dy": None, "shortcut_mask": None},
    ):
        assert backend.reason(backward_input3x3(**changes)) is None
    for changes in ({}, {"mask": None}, {"center": None}):
        assert backend.reason(backward_weight(**changes)) is None
    assert backend.reason(Gram(image(17), vector(17), vector(17))) is None
    for changes in ({}, {"bias": None}):
        assert backend.reason(output_stats(**changes)) is None
    for changes in ({}, {"bias": None}, FROZEN):
        assert backend.reason(coefficients(**changes)) is None
    for changes in ({}, {"mask": None}, FROZEN_INPUT):
        assert backend.reason(gram_backward_input(**changes)) is None
    assert backend.reason(Conv1x1Forward(image(8, batch=0), weight(8, 8), stride=2)) is None
    assert backend.reason(Conv1x1Forward(image(8, dtype=torch.half), weight(8, 8, torch.half))) is None


def test_what_products_do_not_take():
    backend = functions.backend()
    expected = (
        (Conv1x1Forward(image(8, dtype=torch.float32), weight(8, 8, torch.float32)), "float32_product"),
        (Conv1x1Forward(image(8, dtype=torch.double), weight(8, 8, torch.double)), "dtype_float64"),
        (forward(x=torch.empty(2, 17, 5, 7, dtype=torch.bfloat16, device="cuda")), "not_channels_last"),
        (forward(weight=weight(33, 17, torch.half)), "mixed_dtypes"),
        (forward(weight=torch.empty(33, 17, 1, 1, dtype=torch.bfloat16)), "mixed_devices"),
        (forward(weight=strided((33, 17, 1, 1), (34, 1, 1, 1))), "not_channels_last"),
        (forward(residual=image(33, dtype=torch.half)), "mixed_dtypes"),
        (forward(bias=vector(33)), "mixed_dtypes"),
        (forward(bias=strided((33,), (2,))), "vector_not_dense"),
        (forward(in_shift=vector(17, torch.double)), "vector_not_float32"),
        (forward(shift=strided((33,), (2,), torch.float32)), "vector_not_dense"),
        (Conv1x1Forward(image(8), weight(2**26 + 1, 8)), "too_many_channels"),
        (
            Conv3x3Forward(
                image(8), weight(8, 8), in_scale=vector(8), in_shift=strided((8,), (2,), torch.float32)
            ),
            "vector_not_dense",
        ),
        (Conv3x3Forward(image(8), weight(8, 8), residual=image(8, dtype=torch.half)), "mixed_dtypes"),
        (backward_input(dy=image(33, dtype=torch.half)), "mixed_dtypes"),
        (
            backward_input(shortcut_dy=torch.empty(2, 17, 5, 7, dtype=torch.bfloat16, device="cuda")),
            "not_channels_last",
        ),
        (
            backward_input(
                grads=BatchNormGrads(*[vector(33)] * 3, strided((33,), (2,), torch.float32), vector(33))
            ),
            "vector_not_dense",
        ),
        (backward_input3x3(stride=2), "stride_or_bias"),
        (backward_input3x3(dy=torch.empty(2, 33, 5, 127, dtype=torch.bfloat16, device="cuda")), "too_wide"),
        (backward_input3x3(c=image(33, dtype=torch.half)), "mixed_dtypes"),
        (backward_input3x3(shortcut_mask=torch.empty(1190, dtype=torch.uint8)), "mixed_devices"),
        (backward_weight(mask=strided((2310,), (2,), torch.uint8)), "vector_not_dense"),
        (backward_weight(mask=torch.empty(2310, dtype=torch.uint8)), "mixed_devices"),
        (backward_weight(center=vector(17, torch.double)), "vector_not_float32"),
        (Gram(image(8, dtype=torch.float32), vector(8), vector(8)), "float32_product"),
        (output_stats(weight=weight(33, 17, torch.float32)), "float32_product"),
        (output_stats(weight=weight(2**26 + 1, 17)), "too_many_channels"),
        (output_stats(bias=vector(33)), "mixed_dtypes"),
        (output_stats(S=strided((17, 17), (1, 17), torch.float32)), "vector_not_dense"),
        (coefficients(weight=weight(33, 17, torch.double)), "dtype_float64"),
        (coefficients(bias=strided((33,), (2,))), "vector_not_dense"),
        (coefficients(r=strided((33, 17), (1, 33), torch.float32)), "vector_not_dense"),
        (coefficients(center=vector(17, torch.double)), "vector_not_float32"),
        (gram_backward_input(c=image(17, dtype=torch.float32)), "mixed_dtypes"),
        (gram_backward_input(mask=strided((2310,), (2,), torch.uint8)), "vector_not_dense"),
        (gram_backward_input(weight_dz=strided((33, 17), (1, 33), torch.float32)), "vector_not_dense"),
        (gram_backward_input(offset=vector(17, torch.double)), "vector_not_float32"),
    )
    for op, reason in expected:
        assert backend.reason(op) == reason, op
        assert reason is None or any(reason == code or reason.startswith(f"{code}_") for code in REASONS)


@pytest.mark.parametrize("accuracy", ["", "/strict"])
def test_products_that_nobody_measured_are_for_those_who_ask(accuracy, monkeypatch):
    plain = Conv1x1Forward(image(8), weight(8, 8))
    gram_form = Gram(image(8), vector(8), vector(8)), output_stats(), coefficients(), gram_backward_input()
    for op in (plain, forward(), backward_input(), backward_weight(), *gram_form):
        assert dispatcher("native" + accuracy).backends[0].reason(op) is None
        assert dispatcher("auto" + accuracy).backends[0].reason(op) == "product_not_measured"
    v, g = BatchNormVectors(*[vector(8)] * 5), BatchNormGrads(*[vector(8)] * 5)
    square = torch.empty(8, 8, 3, 3, dtype=torch.bfloat16, device="cuda")
    for op in (
        Conv3x3Forward(image(8), square, in_scale=vector(8), in_shift=vector(8), save_stats=True),
        Conv3x3BackwardInput(image(8), image(8), square, 1, image(8), v, g),
    ):
        assert dispatcher("auto" + accuracy).backends[0].reason(op) is None
    monkeypatch.setattr(products, "MEASURED_PRODUCTS", {"some GPU"})
    products.is_measured.cache_clear()
    assert AUTO_LOADERS["native"]().reason(plain) is None
