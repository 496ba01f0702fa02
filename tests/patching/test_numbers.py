"""Numbers of modules in every type that torch takes: as unpatched, or the original runs and the code says so."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from block_forms import randomize
from library_models import TorchvisionResNet
from same_model import assert_same_buffers, assert_same_step, images, pair
from spellings import InPlaceAdd, TwoConvs, conv_bn
from torch import Tensor, nn

import fusedres
from fusedres.models import Bottleneck


def expanding() -> nn.Module:
    return Bottleneck(16, 8, downsample=nn.Sequential(*conv_bn(16, 32, 1)))


def norms(block: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]


def every_norm(name: str, value):
    def change(block):
        for bn in norms(block):
            setattr(bn, name, value)

    return change


def tensors_beside_floats(block):
    block.bn1.momentum, block.bn2.momentum, block.bn3.momentum = torch.tensor(0.25), 0.5, None


def of_conv2(**values):
    return lambda block: vars(block.conv2).update(values)


TAKEN = {
    "momentum_float64": every_norm("momentum", np.float64(0.25)),
    "momentum_float32": every_norm("momentum", np.float32(0.3)),
    "momentum_int": every_norm("momentum", 1),
    "eps_float64": every_norm("eps", np.float64(0.25)),
    "eps_int": every_norm("eps", 1),
    "padding_list": of_conv2(padding=[2, 2], dilation=[2]),
    "padding_int64": of_conv2(padding=np.int64(2), dilation=(np.int64(2), np.int8(2))),
    "padding_size": of_conv2(padding=torch.Size([2, 2]), dilation=2),
    "groups_int64": of_conv2(groups=np.int64(1)),
}
LEFT = {
    "momentum": every_norm("momentum", torch.tensor(0.25, dtype=torch.float64)),
    "momentum ": tensors_beside_floats,
    "momentum  ": every_norm("momentum", True),
    "eps": every_norm("eps", torch.tensor(0.25)),
    "stride": of_conv2(stride=torch.tensor(1)),
    "padding": of_conv2(padding=(torch.tensor(2), 2), dilation=2),
    "padding ": of_conv2(padding="same"),
    "dilation": of_conv2(dilation=torch.tensor([1])),
    "groups": of_conv2(groups=torch.tensor(1)),
}


def assert_changed_alike(change, recipe: str, code: str | None) -> None:
    """Changed after patching and before, a block steps as unpatched; code: the start of its reason."""
    plain, fused = pair(expanding, recipe)
    early = copy.deepcopy(plain)
    change(plain), change(fused), change(early)
    early = fusedres.patch(nn.Sequential(early), recipe=recipe)
    twin = nn.Sequential(copy.deepcopy(plain))
    for one, other, rows in ((plain, fused, fused), (twin, early, early)):
        for _ in range(2):
            assert_same_step(one, other)
        (row,) = fusedres.report(rows).blocks
        assert row.runs_as == recipe if code is None else (row.code or "").startswith(code), row


@pytest.mark.parametrize("recipe", ["separate", "gram"])
@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.filterwarnings("ignore:fusedres.patch")
def test_a_number_that_is_taken(name, recipe):
    assert_changed_alike(TAKEN[name], recipe, None)


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.filterwarnings("ignore:fusedres.patch")
def test_a_number_that_is_left_to_torch(name):
    assert_changed_alike(LEFT[name], "separate", f"unusual_number:{name.strip()}, ")


def test_every_code_of_a_number_has_a_sentence():
    plain, fused = pair()
    every_norm("momentum", torch.tensor(0.5))(fused)
    fused(images())
    assert "(momentum, Tensor)" in str(fusedres.report(fused))
    with pytest.raises(ValueError, match="momentum: needs a number of Python or NumPy, found a Tensor"):
        fusedres.nn.residual_block(images(), [fusedres.nn.ConvBN(fused.conv1, fused.bn1, True)])
    assert plain.bn1.num_batches_tracked == 0


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_an_eps_that_is_not_positive(eps):
    plain, fused = pair()
    every_norm("eps", eps)(plain), every_norm("eps", eps)(fused)
    if eps != eps:
        assert plain(images()).isnan().all() and fused(images()).isnan().all()
    else:
        for block in (plain, fused):
            with pytest.raises(ValueError, match="eps must be positive"):
                block(images())
    assert fusedres.report(fused).blocks[0].code.partition(":")[0] == "eps_not_positive"


@pytest.mark.parametrize("momentum", [float("nan"), float("inf")])
def test_a_momentum_that_is_no_number(momentum):
    plain, fused = pair(expanding)
    for block in (plain, fused):
        every_norm("momentum", momentum)(block)
        block(images())
    assert fusedres.report(fused).blocks[0].runs_as == "separate"
    for (name, exact), actual in zip(plain.named_buffers(), fused.buffers(), strict=True):
        assert torch.equal(actual.nan_to_num(7), exact.nan_to_num(7)), name


POOLS = {
    "lists": ({"kernel_size": [3, 3], "stride": [2, 2], "padding": [1]}, "separate", None),
    "numpy": ({"kernel_size": np.int64(3), "stride": (np.int64(2), 2)}, "separate", None),
    "tensor": ({"stride": torch.tensor(2)}, "unfused", "unusual_number:stride, Tensor"),
    "zero_stride": ({"stride": None}, "unfused", "unusual_number:stride, NoneType"),
    "not_square": (
        {"kernel_size": [2, 3], "padding": 1},
        "unfused",
        "geometry_changed:maxpool, kernel_size=[2, 3], stride=2, padding=1, dilation=1, ceil_mode=False",
    ),
}


@pytest.mark.parametrize("name", POOLS)
def test_numbers_of_a_pooling(name):
    values, runs_as, code = POOLS[name]
    plain = randomize(TorchvisionResNet()).double()
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    for model in (plain, fused):
        vars(model.maxpool).update(values)
    assert_same_step(plain, fused, images(2, 3, 33, 33))
    row = fusedres.report(fused).blocks[0]
    assert (row.name, row.runs_as, row.code) == ("stem", runs_as, code)
    again = fusedres.report(fusedres.patch(copy.deepcopy(plain), recipe="separate")).blocks[0]
    assert again.code == ("unsupported_module:MaxPool2d" if name == "not_square" else code)


class PooledShortcut(TwoConvs):
    """A shortcut that is a module of its own, called beside the main path."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(nn.AvgPool2d(1), *conv_bn(16, 16, 1))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.shortcut(x))


def share(name: str, first: str, second: str, view: bool = False):
    def change(block):
        tensor = getattr(block.get_submodule(first), name)
        setattr(block.get_submodule(second), name, tensor[:] if view else tensor)
        for bn in norms(block):
            bn.momentum = None if name == "num_batches_tracked" else 0.5

    return change


def mean_is_variance(block):
    block.bn1.running_var = block.bn1.running_mean


def mean_is_frozen_elsewhere(block):
    block.bn2.running_mean = block.bn1.running_mean
    block.bn2.eval()


def mean_is_a_bias(block):
    block.bn2.bias = nn.Parameter(block.bn1.running_mean, requires_grad=False)


def mean_outside_the_buffers(block):
    mean = block.bn1.running_mean
    for bn in norms(block):
        del bn.running_mean
        bn.running_mean = mean


def mean_is_a_parameter(block):
    mean = nn.Parameter(block.bn1.running_mean, requires_grad=False)
    for bn in norms(block):
        del bn.running_mean
        bn.running_mean = mean


def mean_is_a_convolutions_bias(block):
    block.conv2.bias = nn.Parameter(block.bn1.running_mean, requires_grad=False)


SHARED = {
    "mean": (InPlaceAdd, share("running_mean", "bn1", "bn2")),
    "variance_view": (InPlaceAdd, share("running_var", "bn1", "bn2", view=True)),
    "counter": (expanding, share("num_batches_tracked", "bn1", "downsample.1")),
    "mean_is_variance": (InPlaceAdd, mean_is_variance),
    "frozen": (InPlaceAdd, mean_is_frozen_elsewhere),
    "bias": (InPlaceAdd, mean_is_a_bias),
    "attribute": (InPlaceAdd, mean_outside_the_buffers),
    "parameter": (InPlaceAdd, mean_is_a_parameter),
    "convolution": (InPlaceAdd, mean_is_a_convolutions_bias),
    "shortcut": (PooledShortcut, share("running_mean", "bn2", "shortcut.2")),
}


@pytest.mark.parametrize("name", SHARED)
def test_norms_that_share_a_buffer(name):
    build, change = SHARED[name]
    plain, fused = pair(build)
    change(plain), change(fused)
    for _ in range(2):
        assert_same_step(plain, fused)
    assert fusedres.report(fused).blocks[0].code.partition(":")[0] == "shared_statistics"
    plain.bn1.running_var.abs_(), fused.bn1.running_var.abs_()
    for block in (plain, fused):
        block.eval()
    assert_same_step(plain, fused)
    assert fusedres.report(fused).blocks[0].code is None  # nothing is moved there


def test_a_counter_that_is_no_tensor():
    plain, fused = pair()
    for block in (plain, fused):
        del block.bn1.num_batches_tracked
        block.bn1.num_batches_tracked = 0
        with pytest.raises(AttributeError, match="'int' object has no attribute 'add_'"):
            block(images())
    assert fusedres.report(fused).blocks[0].code == "unusual_number:num_batches_tracked, int"


def compiled_step(block: nn.Module, x: Tensor) -> None:
    torch.compiler.reset()
    torch.compile(block, backend="aot_eager")(x).square().sum().backward()


@pytest.mark.parametrize("name", ["momentum", "padding ", "shared"])
def test_a_compiled_block(name):
    plain, fused = pair()
    change = SHARED["mean"][1] if name == "shared" else {**LEFT, "momentum": LEFT["momentum"]}[name]
    change(plain), change(fused)
    x = images()
    plain(x).square().sum().backward()
    compiled_step(fused, x)
    assert_same_buffers(plain, fused)
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.allclose(q.grad, p.grad, rtol=1e-10, atol=1e-12)
