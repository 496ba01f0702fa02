"""Residual blocks of every form that the recipes run, and how a patched one is held against its unpatched twin."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fusedres
from fusedres.models import BasicBlock, Bottleneck


def projection(cin: int, cout: int, stride: int = 1, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=bias), nn.BatchNorm2d(cout))


def each_bn(block: nn.Module) -> list[nn.BatchNorm2d]:
    """torch's, and frozen ones."""
    return [m for m in block.modules() if hasattr(m, "running_var")]  # type: ignore[misc]


def randomize(block: nn.Module, seed: int = 0) -> nn.Module:
    """The same weights in every build; BN away from 1 and 0, so that none of it can be dropped unseen."""
    generator = torch.Generator().manual_seed(seed)
    for conv in [m for m in block.modules() if isinstance(m, nn.Conv2d)]:
        fan_in = conv.weight[0].numel()
        conv.weight.data.copy_(torch.randn(conv.weight.shape, generator=generator) / fan_in**0.5)
    for bn in each_bn(block):
        for tensor, low in (
            (bn.weight, 0.5),
            (bn.bias, -0.5),
            (bn.running_mean, -0.5),
            (bn.running_var, 0.5),
        ):
            if tensor is not None:
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return block


def with_bias(block: nn.Module) -> nn.Module:
    for conv in [m for m in block.modules() if isinstance(m, nn.Conv2d)]:
        conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels))
    return block


def dilated(block: Bottleneck) -> nn.Module:
    block.conv2.dilation = block.conv2.padding = (2, 2)
    return block


def grouped(block: Bottleneck) -> nn.Module:
    width = block.conv2.in_channels
    block.conv2 = nn.Conv2d(width, width, 3, block.conv2.stride, 1, groups=32, bias=False)
    return randomize(block)


def strided_1x1(block: Bottleneck) -> nn.Module:
    block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    return block


def frozen(block: nn.Module) -> nn.Module:
    for bn in each_bn(block):
        bn.eval()
    return block


def mixed_modes(block: Bottleneck) -> nn.Module:
    block.bn1.eval()
    block.bn3.eval()
    return block


def cumulative(block: nn.Module) -> nn.Module:
    for bn in each_bn(block):
        bn.momentum = None
    return block


def zero_gamma(block: nn.Module) -> nn.Module:
    last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
    last.weight.data.zero_()
    return block


def biased_before(value: float) -> Callable[[Bottleneck], nn.Module]:
    """The BN before the last convolution with a large bias: what makes an uncentred Gram matrix cancel."""

    def change(block: Bottleneck) -> nn.Module:
        block.bn2.bias.data.add_(value)
        return block

    return change


class WithoutMiddleReLU(Bottleneck):
    """The twin of a block whose second BN has a bias so large that its ReLU never acts.

    The bias shifts the last convolution's input by a constant, which the last BN takes out again: without bias and
    ReLU the function and every gradient are the same, but nothing cancels. Plain autograd on the block itself is
    off by 5e-10 in float64 there, on this twin it is exact.
    """

    def forward(self, x: Tensor) -> Tensor:
        a = self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x)))))
        return self.activation(self.bn3(self.conv3(a)) + x)


def well_conditioned() -> nn.Module:
    return randomize(WithoutMiddleReLU(32, 8))


def without_affine(block: nn.Module) -> nn.Module:
    for bn in each_bn(block):
        bn.weight = bn.bias = None
        bn.affine = False
    return block


def without_statistics(block: nn.Module) -> nn.Module:
    for bn in each_bn(block):
        bn.track_running_stats = False
        bn.running_mean = bn.running_var = bn.num_batches_tracked = None
    return block


@dataclass(frozen=True)
class BlockForm:
    """A block to build, in training mode unless a change says otherwise, and the channels of its input."""

    name: str
    build: Callable[[], nn.Module]
    cin: int
    dy_mean: float = 0.0
    size: int = 6
    twin: Callable[[], nn.Module] | None = None  # same function and gradients, better conditioned

    @property
    def has_gram(self) -> bool:
        return "basic" not in self.name


def bottleneck(change: Callable = lambda block: block, cin: int = 32, width: int = 8, **options):
    return lambda: change(randomize(Bottleneck(cin, width, **options)))


def basic(change: Callable = lambda block: block, cin: int = 16, width: int = 16, **options):
    return lambda: change(randomize(BasicBlock(cin, width, **options)))


def projected(**options):
    """A fresh projection each time: a module must not be shared between builds."""
    return lambda: randomize(Bottleneck(16, 8, 2, randomize(projection(16, 32, 2)), **options))


FORMS = [
    BlockForm("basic", basic(), 16),
    BlockForm("basic-projection", lambda: randomize(BasicBlock(16, 32, 2, projection(16, 32, 2))), 16),
    BlockForm("basic-plain", basic(residual=False), 16),
    BlockForm("basic-zero-gamma", basic(zero_gamma), 16),
    BlockForm("bottleneck", bottleneck(), 32),
    BlockForm("bottleneck-projection", projected(), 16),
    BlockForm("bottleneck-plain", bottleneck(residual=False), 32),
    BlockForm("bottleneck-groups-32", bottleneck(grouped, cin=256, width=64), 256, size=3),
    BlockForm("bottleneck-dilation-2", bottleneck(dilated), 32),
    BlockForm("bottleneck-stride-in-1x1", lambda: strided_1x1(projected()()), 16),
    BlockForm("bottleneck-conv-bias", bottleneck(with_bias), 32),
    BlockForm("bottleneck-projection-conv-bias", lambda: with_bias(projected()()), 16),
    BlockForm("bottleneck-frozen", bottleneck(lambda b: frozen(with_bias(b))), 32),
    BlockForm("bottleneck-mixed-modes", bottleneck(mixed_modes), 32),
    BlockForm("bottleneck-eval", bottleneck(lambda b: b.eval()), 32),
    BlockForm("bottleneck-projection-eval", lambda: projected()().eval(), 16),
    BlockForm("bottleneck-momentum-none", bottleneck(cumulative), 32),
    BlockForm("bottleneck-zero-gamma", bottleneck(zero_gamma), 32),
    BlockForm("bottleneck-bias-before-30", bottleneck(biased_before(30.0)), 32),
    BlockForm("bottleneck-bias-before-1000", bottleneck(biased_before(1000.0)), 32, twin=well_conditioned),
    BlockForm("bottleneck-dy-mean-1", bottleneck(), 32, dy_mean=1.0),
    BlockForm("bottleneck-dy-mean-1-many-rows", bottleneck(), 32, dy_mean=1.0, size=28),
    BlockForm("bottleneck-frozen-dy-mean-1", bottleneck(frozen), 32, dy_mean=1.0, size=20),
    BlockForm("bottleneck-no-affine", bottleneck(without_affine), 32),
    BlockForm("bottleneck-no-statistics", bottleneck(without_statistics), 32),
]

RECIPE_FORMS = [
    (recipe, form)
    for form in FORMS
    for recipe in ("separate", "prologue", "gram")
    if recipe == "separate"
    or (form.has_gram if recipe == "gram" else form.name in ("basic", "basic-projection"))
]
RECIPE_FORM_IDS = [f"{recipe}-{form.name}" for recipe, form in RECIPE_FORMS]


@dataclass
class Step:
    """What one forward and backward gave."""

    y: Tensor
    dx: Tensor | None
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def one_step(block: nn.Module, x: Tensor, dy: Tensor) -> Step:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = block(x)
    y.backward(dy)
    gradients = {name: p.grad for name, p in block.named_parameters()}
    return Step(y.detach(), x.grad, gradients, {k: b.clone() for k, b in block.named_buffers()})


def tensors_for(
    form: BlockForm, block: nn.Module, dtype: torch.dtype, batch: int = 3, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """x [batch, cin, size, size] channels_last, and dy like the block's output."""
    torch.manual_seed(seed)
    x = torch.randn(batch, form.cin, form.size, form.size, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        y = copy.deepcopy(block).eval()(x)
    return x, torch.randn_like(y) + form.dy_mean


def patched(block: nn.Module, recipe: str, backend: str = "auto") -> nn.Module:
    """The block itself, patched; it must be matched."""
    return fusedres.patch(block, recipe=recipe, backend=backend, strict=True)


def ran_as(block: nn.Module, recipe: str) -> bool:
    """Whether the last call of the patched block ran that recipe, as its report says."""
    return all(row.runs_as == recipe for row in fusedres.report(block).matched)
