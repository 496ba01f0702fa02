"""3x3 convolutions with groups on the CPU: every op against float64 and eager, of every side and size of group."""

import grouped_checks
import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from grouped_checks import STRIDES, convolved, dense, gradients, operands, served
from torch import nn

import fusedres
from fusedres.models.blocks import Bottleneck, conv1x1, conv3x3
from fusedres.ops.contract import Conv3x3Forward, ConvBackwardInput, ConvBackwardWeight
from fusedres.ops.native import functions, grouped, kept_memory, library, reasons

pytestmark = pytest.mark.skipif(
    not library.is_built() or not reasons.product_dtypes(), reason="no kernels of convolutions here"
)

EVERY = [
    pytest.param(
        (*sides, *groups, stride), id=f"{sides[0]}x{sides[1]}-{groups[0]}by{groups[1]}-stride{stride}"
    )
    for sides in grouped_checks.SIDES
    for groups in grouped_checks.GROUPS
    for stride in grouped_checks.STRIDES
]


@pytest.fixture(autouse=True)
def any_groups(monkeypatch):
    """Those too that the library is as fast with."""
    monkeypatch.setattr(grouped, "MOST_IN_GROUP", 64)
    monkeypatch.setattr(grouped, "MOST_IN_GROUP_WITH_BN", 64)


@pytest.mark.parametrize("case", EVERY)
def test_forward(case):
    grouped_checks.check_forward(*case)


@pytest.mark.parametrize("case", EVERY)
def test_gradients(case):
    grouped_checks.check_gradients(*case)


def test_weight_gradient_of_many_positions():
    """Sums over more rows than are summed at once, whose mean is not 0."""
    x, weight, dy = operands(56, 56, 32, 4, 1, batch=4)
    x, dy = x + 3, dy + 1
    exact, eager = gradients(dy.double(), x.double(), weight.double(), 1)[1], gradients(dy, x, weight, 1)[1]
    dw = served(ConvBackwardWeight(dy, x, (3, 3), (1, 1), (1, 1), (1, 1), 8))
    assert_as_accurate_as_eager(dw, eager, exact, "dweight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (4, 3), (8, 6)])
@pytest.mark.parametrize("stride", STRIDES)
def test_what_is_not_finite_stands_where_it_does_unpatched(stride, place, value):
    """Padding is no product: an infinite weight or gradient beside it makes no NaN."""
    x, weight, dy = operands(9, 7, 32, 4, stride)
    window = (stride, stride), (1, 1), (1, 1), 8
    x[1, 5, place[0], place[1]] = value
    assert_same_places(served(Conv3x3Forward(x, weight, stride, groups=8)).y, convolved(x, weight, stride))
    eager = gradients(dy, x, weight, stride)[1]
    assert_same_places(served(ConvBackwardWeight(dy, x, (3, 3), *window)), eager)
    x, weight, dy = operands(9, 7, 32, 4, stride)
    weight[9, 2, 1, 0] = value
    assert_same_places(served(Conv3x3Forward(x, weight, stride, groups=8)).y, convolved(x, weight, stride))
    x, weight, dy = operands(9, 7, 32, 4, stride)
    dy[2, 30, place[0] // stride, place[1] // stride] = value
    eager = gradients(dy, x, weight, stride)
    assert_same_places(served(ConvBackwardWeight(dy, x, (3, 3), *window)), eager[1])
    if stride == 1:
        assert_same_places(served(ConvBackwardInput(dy, x, weight, *window)), eager[0])


def assert_same_places(found, eager):
    assert torch.equal(found.isnan(), eager.isnan())
    for sign in (1, -1):
        assert torch.equal(found == sign * torch.inf, eager == sign * torch.inf)


def test_no_result_depends_on_the_number_of_threads():
    x, weight, dy = operands(28, 28, 64, 4, 1, batch=8)
    window = (1, 1), (1, 1), (1, 1), 16
    ops = (
        Conv3x3Forward(x, weight, groups=16),
        ConvBackwardInput(dy, x, weight, *window),
        ConvBackwardWeight(dy, x, (3, 3), *window),
    )
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            found.append([served(op) if not isinstance(op, Conv3x3Forward) else served(op).y for op in ops])
        torch.set_num_threads(64)
        assert functions.backend().reason(ops[2]) == "too_many_threads"
        assert torch.equal(served(ops[0]).y, found[0][0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_memory_is_not_read_or_written_beyond_the_tensors():
    """Canaries before and behind each tensor, which the vectors end at."""
    x, weight, _ = operands(5, 5, 32, 4, 1)
    y = convolved(x, weight, 1)
    padded = torch.full((y.numel() + 128,), 7.0)
    inner = padded[64:-64].view(3, 5, 5, 32).permute(0, 3, 1, 2)
    scale, shift = torch.ones(32), torch.zeros(32)
    torch.ops.fusedres_native.grouped_conv3x3_forward_out(x, weight, 1, scale, shift, False, inner)
    assert torch.equal(inner, served(Conv3x3Forward(x, weight, groups=8)).y)
    assert bool((padded[:64] == 7).all()) and bool((padded[-64:] == 7).all())


def test_results_lie_in_kept_memory(monkeypatch):
    kept = kept_memory.KeptMemory()
    monkeypatch.setattr(kept_memory, "KEPT", kept)
    monkeypatch.setattr(kept_memory, "LARGE", 0)
    x, weight, _ = operands(7, 9, 32, 4, 2)
    op = Conv3x3Forward(x, weight, 2, scale=torch.ones(32), shift=torch.zeros(32), groups=8)
    expected = served(op._replace(scale=None, shift=None)).y
    assert torch.equal(served(op).y, expected)
    assert kept.results == 2


LEFT = {
    "two channels a group": (Conv3x3Forward, {"in_group": 2}, "groups"),
    "twelve channels a group": (Conv3x3Forward, {"in_group": 12, "channels": 48}, "groups"),
    "channels that fill no vector": (Conv3x3Forward, {"channels": 20}, "groups"),
    "prologue": (Conv3x3Forward, {"in_scale": torch.ones(32), "in_shift": torch.ones(32)}, "groups"),
    "mask": (Conv3x3Forward, {"save_mask": True}, "groups"),
    "empty": (Conv3x3Forward, {"batch": 0}, "empty"),
    "float64": (Conv3x3Forward, {"dtype": torch.float64}, "no_kernel"),
    "NCHW": (Conv3x3Forward, {"format": torch.contiguous_format}, "not_channels_last"),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_left_to_another_backend(what):
    kind, change, reason = LEFT[what]
    change = dict(change)
    channels, in_group = change.pop("channels", 32), change.pop("in_group", 4)
    x = torch.randn(change.pop("batch", 2), channels, 5, 5, dtype=change.pop("dtype", torch.float32))
    x = x.contiguous(memory_format=change.pop("format", torch.channels_last))
    weight = torch.randn(channels, in_group, 3, 3).to(x.dtype)
    assert functions.backend().reason(kind(x, weight, groups=channels // in_group, **change)) == reason


def test_gradients_that_are_left_to_another_backend():
    x, weight, dy = operands(9, 9, 32, 4, 2)
    backend, window = functions.backend(), ((2, 2), (1, 1), (1, 1), 8)
    assert backend.reason(ConvBackwardInput(dy, x, weight, *window)) == "groups"
    assert backend.reason(ConvBackwardWeight(dy, x, (1, 1), (2, 2), (0, 0), (1, 1), 8)) == "groups"
    assert backend.reason(ConvBackwardWeight(x, x, (3, 3), (1, 1), (2, 2), (2, 2), 8)) == "groups"
    same = (1, 1), (1, 1), (1, 1), 8
    assert backend.reason(ConvBackwardInput(x, x, weight, *same, x)) == "groups"
    assert backend.reason(ConvBackwardInput(x, x, weight.double(), *same)) == "mixed_dtypes"


@pytest.mark.parametrize(
    ("op", "args", "message"),
    [
        (
            "forward",
            {"weight": torch.zeros(32, 4, 1, 1)},
            r"weight is \[32, 4, 1, 1\], needed \[32, Cin/groups, 3, 3\]",
        ),
        ("forward", {"weight": torch.zeros(32, 3, 3, 3)}, "the weight is 3 channels a group, of 32"),
        ("forward", {"weight": torch.zeros(32, 4, 3, 3).double()}, "weight is float64, needed float32"),
        ("forward", {"stride": 3}, "stride is 3, needed 1 or 2"),
        ("forward", {"scale": torch.zeros(32)}, "scale, shift is given in part"),
        ("forward", {"x": torch.zeros(2, 32, 5, 5).bfloat16()}, "weight is float32, needed bfloat16"),
        (
            "backward_weight",
            {"dy": torch.zeros(2, 32, 3, 3)},
            r"dy is \[2, 32, 3, 3\], needed the output's shape",
        ),
        ("backward_weight", {"in_group": 5}, "the weight is 5 channels a group"),
        ("backward_weight", {"in_group": 0}, "the weight is 0 channels a group"),
        ("backward_input", {"weight": torch.zeros(24, 4, 3, 3)}, r"weight is \[24, 4, 3, 3\]"),
    ],
)
def test_ops_say_what_is_wrong(op, args, message):
    library.load()
    image = torch.zeros(2, 32, 5, 5)
    given = {
        "forward": {
            "x": image,
            "weight": torch.zeros(32, 4, 3, 3),
            "stride": 1,
            "scale": None,
            "shift": None,
            "relu": False,
        },
        "backward_weight": {"dy": image, "x": image, "in_group": 4, "stride": 1},
        "backward_input": {"dy": image, "weight": torch.zeros(32, 4, 3, 3)},
    }[op] | args
    given = {n: dense(v) if isinstance(v, torch.Tensor) and v.dim() == 4 else v for n, v in given.items()}
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.fusedres_native, f"grouped_conv3x3_{op}")(**given)


def resnext_block(stride):
    """32 channels, four a group."""
    torch.manual_seed(0)
    downsample = nn.Sequential(conv1x1(128, 128, stride), nn.BatchNorm2d(128)) if stride > 1 else None
    block = Bottleneck(128, 32, stride, downsample)
    block.conv2 = conv3x3(32, 32, stride, groups=8)
    return block


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", STRIDES)
def test_a_block_runs_by_these_kernels(stride, training, monkeypatch):
    called = []
    for name in ("conv3x3_forward", "conv_backward_weight", "conv_backward_input"):
        original = getattr(grouped, name)
        monkeypatch.setattr(grouped, name, lambda op, n=name, f=original: called.append(n) or f(op))
    block = resnext_block(stride).train(training).to(memory_format=torch.channels_last)
    x = dense(torch.randn(2, 128, 14, 14)).requires_grad_(training)
    fusedres.patch(block, recipe="separate", strict=True)
    with torch.set_grad_enabled(training):
        y = block(x)
    if training:
        y.sum().backward()
    expected = ["conv3x3_forward"] + (
        ["conv_backward_weight"] + ["conv_backward_input"] * (stride == 1)
    ) * training
    assert called == expected
