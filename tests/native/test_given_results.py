"""Native ops that write into a tensor they are given: with equal results, and never over what they read."""

import pytest
import torch

from fusedres.ops.native import kept_memory, library

pytestmark = pytest.mark.skipif(not library.is_built(), reason="no compiled library in this installation")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_result_that_goes_past_the_caches_is_the_same(backward):
    """Of 1x1 products: from 8 MiB on they do, if they are given."""
    library.load()
    ops = torch.ops.fusedres_native
    x = torch.randn(3, 40, 120, 121).contiguous(memory_format=torch.channels_last)
    y = kept_memory.take(x, 64, 120, 121)
    assert y is not None and y.numel() * y.element_size() > 8 << 20
    residual = torch.randn_like(y)
    v = torch.randn(64)
    y.fill_(torch.nan)
    if backward:
        weight = torch.randn(40, 64, 1, 1).contiguous(memory_format=torch.channels_last)
        mask = torch.randint(0, 256, (y.numel() // 8,), dtype=torch.uint8)
        for shortcut in ((None, None), (residual, None), (residual, mask)):
            ops.conv_backward_input_out(x, weight, *shortcut, y)
            assert torch.equal(y, ops.conv_backward_input(x, weight, *shortcut))
        return
    weight = torch.randn(64, 40, 1, 1).contiguous(memory_format=torch.channels_last)
    forms = [(None,) * 5, (v, v, None, None, None), (v, v, residual, None, None), (v, v, residual, v, v)]
    for form in forms:
        for relu in {False, form[0] is not None}:
            ops.conv1x1_forward_out(x, weight, 1, *form, relu, y)
            expected = ops.conv1x1_forward(x, weight, None, 1, None, None, *form, relu)[0]
            assert torch.equal(y, expected)


def test_gradients_and_activations_are_not_written_over_what_is_read():
    library.load()
    ops, v = torch.ops.fusedres_native, torch.zeros(16)
    c = torch.zeros(2, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    pooled = torch.zeros(2, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    one, nine = (torch.zeros(16, 16, k, k).contiguous(memory_format=torch.channels_last) for k in (1, 3))
    calls = {
        "y is in the memory of c": lambda: ops.bn_add_relu_forward_out(
            c, v, v, None, None, None, True, False, c
        ),
        "dx is in the memory of dy": lambda: ops.conv_backward_input_out(c, one, None, None, c),
        "dx is in the memory of shortcut_dy": lambda: ops.conv3x3_backward_input_out(
            torch.ones_like(c), nine, c, None, 4, c
        ),
        "dc is in the memory of c": lambda: ops.bn_relu_maxpool_backward_input_out(
            pooled, pooled.byte(), c, v, v, v, 3, 2, 1, c
        ),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{message}, needed memory of its own"):
            call()


@pytest.mark.parametrize("held", ["x", "weight", "residual"])
def test_a_convolution_does_not_write_over_what_it_reads(held):
    library.load()
    made = {"x": (2, 16, 9, 9), "weight": (16, 16, 1, 1), "residual": (2, 16, 9, 9)}
    made = {
        name: torch.zeros(shape).contiguous(memory_format=torch.channels_last) for name, shape in made.items()
    }
    v, ops = torch.zeros(16), torch.ops.fusedres_native
    y = made[held] if held != "weight" else torch.empty_strided((2, 16, 9, 9), made["x"].stride())
    if held == "weight":
        y.set_(torch.zeros(y.numel() + 100).untyped_storage(), 64, y.shape, y.stride())
        made["weight"].set_(y.untyped_storage(), 0, (16, 16, 1, 1), (16, 1, 16, 16))
    with pytest.raises(RuntimeError, match=f"y is in the memory of {held}, needed memory of its own"):
        ops.conv1x1_forward_out(made["x"], made["weight"], 1, v, v, made["residual"], None, None, True, y)
    if held == "weight":
        return
    made["weight"] = torch.zeros(16, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=f"y is in the memory of {held}, needed memory of its own"):
        ops.conv3x3_forward_out(
            made["x"], made["weight"], None, None, v, v, made["residual"], None, None, True, False, 4, y
        )


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(2, 16, 9, 8), r"y is \[2, 16, 9, 8\], needed 9 along dimension 3"),
        (torch.zeros(2, 16, 9, 9, dtype=torch.float64), "y is float64, needed float32"),
        (torch.zeros(2, 16, 9), r"y is \[2, 16, 9\], needed \[N, C, H, W\]"),
    ],
)
def test_a_convolution_says_what_is_wrong_with_its_result(y, message):
    library.load()
    y = y if y.dim() != 4 else y.contiguous(memory_format=torch.channels_last)
    x, weight = torch.zeros(2, 16, 9, 9), torch.zeros(16, 16, 1, 1)
    x, v = x.contiguous(memory_format=torch.channels_last), torch.zeros(16)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedres_native.conv1x1_forward_out(x, weight, 1, v, v, None, None, None, True, y)
