"""The fused stem, convolution, BN, ReLU and max-pooling in one, against plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, assert_same_float64
from block_forms import one_step, randomize
from torch import nn

import fusedres
from fusedres.blocks import conv_bn, separate
from fusedres.models import cifar_resnet, resnet18
from fusedres.nn import ConvBN, stem_block


class Stem(nn.Module):
    """A stem by itself; `fused` chooses how it runs."""

    def __init__(self, pool: nn.MaxPool2d, bias: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(3, 16, 7, 2, 3, bias=bias), nn.BatchNorm2d(16), pool
        self.fused = False

    def forward(self, x):
        if self.fused:
            return stem_block(x, ConvBN(self.conv, self.bn, True), self.pool)
        return self.pool(torch.relu(self.bn(self.conv(x))))


POOLS = [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d(3, 1)]


@pytest.mark.parametrize("pool", POOLS, ids=["3x3/2", "2x2/2", "3x3/1"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_stem_equals_autograd_in_float64(pool, training, bias):
    torch.manual_seed(0)
    plain = randomize(Stem(pool, bias)).double().train(training)
    fused = copy.deepcopy(plain)
    fused.fused = True
    x = torch.randn(2, 3, 21, 19, dtype=torch.float64)
    dy = torch.randn_like(copy.deepcopy(plain)(x)) + 1
    expected, actual = one_step(plain, x, dy), one_step(fused, x, dy)
    assert_same_float64(actual.y, expected.y, "y")
    assert_same_float64(actual.dx, expected.dx, "dx")
    for name in ("conv.weight", "bn.weight", "bn.bias", *([] if training or not bias else ["conv.bias"])):
        assert_same_float64(actual.gradients[name], expected.gradients[name], name)
    for name in ("bn.running_mean", "bn.running_var"):
        assert_same_float64(actual.buffers[name], expected.buffers[name], name)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "NCHW"])
def test_inference_convolves_a_few_images_at_a_time(channels_last, monkeypatch):
    torch.manual_seed(0)
    images = torch.get_num_threads()
    plain = randomize(Stem(POOLS[0], True)).eval()
    fused = copy.deepcopy(plain)
    fused.fused = True
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2 * images + 1, 3, 21, 19).to(memory_format=layout)
    convolved = []

    def convolve(part, *args):
        convolved.append(part.shape[0])
        return conv_bn.convolve(part, *args)

    monkeypatch.setattr(separate, "convolve", convolve)
    monkeypatch.setattr(separate, "BYTES_OF_PART", 1)
    with torch.no_grad():
        found, expected = fused(x), plain(x)
        exact = plain.double()(x.double())
    assert convolved == [images, images, 1]
    assert found.is_contiguous(memory_format=layout)
    assert_as_accurate_as_eager(found, expected, exact)


def test_second_derivatives():
    torch.manual_seed(0)
    stem = randomize(Stem(nn.MaxPool2d(2), False)).double()
    stem.fused = True
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(stem, (x,), fast_mode=True)


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d((3, 2)), nn.MaxPool2d(3, dilation=2), nn.MaxPool2d(3, ceil_mode=True), nn.MaxPool2d(17)],
    ids=["oblong", "dilated", "ceil", "large"],
)
def test_other_poolings_are_refused(pool):
    stem = Stem(pool, False)
    stem.fused = True
    with pytest.raises(ValueError, match="square window"):
        stem(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("build", [resnet18, lambda **o: cifar_resnet(20, **o)], ids=["imagenet", "cifar"])
def test_the_reference_models_stem_is_patched(build):
    torch.manual_seed(0)
    plain = build(num_classes=4).double()
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate", include="stem")
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    y = fused(x)
    assert_same_float64(y, plain(x), "y")
    (row,) = fusedres.report(fused).matched
    assert row.name == "stem" and row.runs_as == "separate"
    assert type(fusedres.unpatch(fused)) is type(plain)


def test_a_changed_stem_runs_unfused():
    model = fusedres.patch(resnet18(num_classes=4), recipe="separate", include="stem")
    x = torch.randn(2, 3, 32, 32)
    seen = []
    handle = model.maxpool.register_forward_hook(lambda *a: seen.append(1))
    model(x)
    assert seen and fusedres.report(model).matched[0].code == "hooks:maxpool"
    handle.remove()
    model.maxpool = nn.AvgPool2d(2)
    model(x)
    assert fusedres.report(model).matched[0].code == "module_replaced:maxpool"


def test_a_stem_of_another_kind_is_left_alone():
    model = resnet18(num_classes=4)
    model.maxpool = nn.Identity()
    rows = {row.name: row for row in fusedres.report(fusedres.patch(model)).blocks}
    assert rows["stem"].code == "unsupported_module:Identity"
    sigmoid = fusedres.patch(fusedres.models.create("cifar_resnet20", activation="sigmoid"))
    codes = {row.code.partition(":")[0] for row in fusedres.report(sigmoid).skipped}
    assert codes == {"activation_not_relu"}


def test_autocast_casts_the_image():
    plain = resnet18(num_classes=4)
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.stem(x).dtype == plain.stem(x).dtype == torch.bfloat16
        fused(x)
    assert {row.runs_as for row in fusedres.report(fused).blocks} == {"separate"}
