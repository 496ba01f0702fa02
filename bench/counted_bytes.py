"""Bytes that a recipe's launches move, counted from the launches themselves: the recipes run on meta tensors.

    python bench/counted_bytes.py [MODEL] [--batch 256] [--recipe gram] [--launches]

Nothing is allocated. Every Triton launch and every torch operation on the way is seen with the tensors it is given;
`roofline.py` predicts the same sum from its schedules. The rules:

    a Triton kernel      every tensor argument moves once, whole: an operand read again by another tile comes from L2;
                         `gram_reference` reads the rows it samples
    a convolution        input, weight and output once; of a 1x1 with a stride only the pixels it uses
    its backward         one launch for each gradient asked for: its two operands and the gradient
    any other operation  every argument and result once, views and allocations nothing
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import native_on_meta
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import jit

from fusedres import models
from fusedres.blocks import RECIPES, separate
from fusedres.blocks.choice import choose
from fusedres.blocks.config import BlockConfig, BlockNeeds, ConvBNNeeds, ConvBNTensors, Shortcut
from fusedres.nn.numbers import square_window
from fusedres.nn.residual_block import ConvBN, read_conv_bn
from fusedres.ops import triton
from fusedres.ops.dispatch import Dispatcher
from fusedres.ops.reference import REFERENCE

NO_TRAFFIC = (
    "empty",
    "detach",
    "view",
    "alias",
    "as_strided",
    "expand",
    "permute",
    "transpose",
    "t.",
    "select",
)
NO_TRAFFIC += ("slice", "unsqueeze", "squeeze", "diagonal", "reshape", "flatten", "_unsafe_view")


@dataclass(frozen=True)
class Counted:
    """One launch: where in the network, forward or backward, which kernel or operation, and its bytes."""

    layer: str
    phase: str
    kernel: str
    bytes: int
    arguments: frozenset[str] = frozenset()  # of a Triton kernel: those that are not None


def size(*tensors: object) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


class LaunchCounter(TorchDispatchMode):
    """Notes every operation on tensors, and every Triton launch instead of launching it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Counted] = []
        self.layer = self.phase = ""

    def note(self, kernel: str, moved: int, arguments: frozenset[str] = frozenset()) -> None:
        self.found.append(Counted(self.layer, self.phase, kernel, moved, arguments))

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """In the place of `triton.JITFunction.run`."""
        named = dict(zip(kernel.arg_names, args, strict=False)) | options
        given = frozenset(name for name in kernel.arg_names if named.get(name) is not None)
        moved = size(*named.values())
        if "SAMPLE" in named:
            moved -= size(named["c"]) - named["SAMPLE"] * named["CIN"] * named["c"].element_size()
        self.note(kernel.__name__.removesuffix("_kernel"), moved, given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        if name.startswith("convolution_backward"):
            result = as_the_library_returns(result)
            self.count_convolution_backward(args, result)
        elif name.startswith("convolution"):
            (result,) = as_the_library_returns((result,))
            x, weight, bias, stride = args[:4]
            self.note("convolution", sampled(x, weight, stride) + size(weight, bias, result))
        elif not name.startswith(NO_TRAFFIC):
            self.note(name.partition(".")[0], size(*tree_leaves((args, kwargs)), *tree_leaves(result)))
        return result

    def count_convolution_backward(self, args: Any, result: Any) -> None:
        dc, x, weight, _, stride = args[:5]
        dx, dweight, dbias = result
        if dx is not None:
            self.note("convolution_backward_input", size(dc, weight, dx))
        if dweight is not None:
            self.note("convolution_backward_weight", size(dc, dweight) + sampled(x, weight, stride))
        if dbias is not None:
            self.note("convolution_backward_bias", size(dc, dbias))


def as_the_library_returns(results: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """In channels_last, as for channels_last operands on a GPU; torch's shape functions say contiguous."""
    return tuple(
        t.contiguous(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t
        for t in results
    )


def sampled(x: Tensor, weight: Tensor, stride: Any) -> int:
    """Bytes of the pixels of x that a convolution uses."""
    if weight.shape[2:] != (1, 1):
        return size(x)
    return size(x[:, :, :: stride[0], :: stride[-1]])


META_TRITON = triton.backend(lambda tensor: None)  # with meta tensors in the place of a GPU's


@contextmanager
def counting() -> Iterator[LaunchCounter]:
    counter = LaunchCounter()

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        counter.launch(kernel, *args, **options)

    with mock.patch.object(jit.JITFunction, "run", run), counter:
        yield counter


def all_needs(units: tuple[ConvBNTensors, ...]) -> tuple[ConvBNNeeds, ...]:
    return tuple(ConvBNNeeds(*(t is not None for t in unit[: len(ConvBNNeeds._fields)])) for unit in units)


def read(block: nn.Module) -> tuple[BlockConfig, tuple[ConvBNTensors, ...]]:
    """A block of `fusedres.models` as data."""
    numbers = [n for n in "123" if hasattr(block, "conv" + n)]
    read_units = [
        read_conv_bn(ConvBN(getattr(block, "conv" + n), getattr(block, "bn" + n), True)) for n in numbers
    ]
    configs, units = zip(*read_units, strict=True)
    if block.downsample is None:
        return BlockConfig(configs, Shortcut.IDENTITY, None, torch.bfloat16), units
    projection, tensors = read_conv_bn(ConvBN(*block.downsample, False))
    return BlockConfig(configs, Shortcut.PROJECTION, projection, torch.bfloat16), (*units, tensors)


class Chain:
    """Stem and blocks of a ResNet on meta tensors, forward and then backward, as a training step runs them."""

    def __init__(self, model: nn.Module, recipe: str, counter: LaunchCounter, native: bool) -> None:
        kernels = native_on_meta.backend(counter.note) if native else META_TRITON
        self.ops = Dispatcher((kernels, REFERENCE))
        self.model, self.recipe, self.counter = model, recipe, counter
        self.backwards: list[Any] = []

    def enter(self, layer: str, phase: str) -> None:
        self.counter.layer, self.counter.phase = layer, phase

    def stem(self, x: Tensor) -> Tensor:
        self.enter("stem", "forward")
        window = square_window(self.model.maxpool)
        unit = ConvBN(self.model.conv1, self.model.bn1, True)
        unit_config, tensors = read_conv_bn(unit)
        config, units = BlockConfig((unit_config,), Shortcut.NONE, None, torch.bfloat16, window), (tensors,)
        out = separate.forward(self.ops, config, x, None, units, True)

        def backward(dy: Tensor) -> Tensor:
            self.enter("stem", "backward")
            needs = BlockNeeds(False, False, all_needs(units))
            separate.backward(self.ops, config, x, units, out.saved, dy, needs)
            return dy

        self.backwards.append(backward)
        return out.y

    def block(self, name: str, block: nn.Module, x: Tensor) -> Tensor:
        self.enter(name, "forward")
        config, units = read(block)
        recipe = RECIPES[choose(self.recipe, config, units, x, self.ops, True).recipe]
        out = recipe.forward(self.ops, config, x, None, units, True)

        def backward(dy: Tensor) -> Tensor:
            self.enter(name, "backward")
            needs = BlockNeeds(True, False, all_needs(units))
            return recipe.backward(self.ops, config, x, units, out.saved, dy, needs).x

        self.backwards.append(backward)
        return out.y

    @torch.no_grad()
    def run(self, x: Tensor) -> None:
        y = self.stem(x)
        for name, module in self.model.named_modules():
            if hasattr(module, "downsample"):
                y = self.block(name, module, y)
        dy = torch.empty_like(y)
        for backward in reversed(self.backwards):
            dy = backward(dy)


def count(model: nn.Module, recipe: str, batch: int, side: int = 224, native: bool = False) -> list[Counted]:
    """Every launch of stem and blocks in a training step in bfloat16; pooling, classifier and optimiser apart.

    Args:
        model: a `fusedres.models.ResNet`; it is left alone.
        recipe: "separate", "prologue" or "gram".
        native: whether the native backend serves what it has, and not Triton: with every recipe but "gram".
    """
    made = copy.deepcopy(model).to("meta", torch.bfloat16, memory_format=torch.channels_last).train()
    shape, layout = (batch, 3, side, side), torch.channels_last
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16, memory_format=layout)
    with counting() as counter:
        Chain(made, recipe, counter, native).run(x)
    return counter.found


def main() -> None:
    from layers import read_network
    from roofline import Machine, launches

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="resnet50", choices=("resnet50", "resnet18"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="gram")
    parser.add_argument("--native", action="store_true", help="the native backend's kernels, not Triton's")
    parser.add_argument("--launches", action="store_true", help="list every launch")
    args = parser.parse_args()
    found = count(models.create(args.model), args.recipe, args.batch, native=args.native)
    if args.launches:
        for launch in found:
            print(f"{launch.layer:12} {launch.phase:9} {launch.kernel:36} {launch.bytes / 1e6:10.2f} MB")
    network = read_network(args.model, models.create(args.model), (3, 224, 224))
    model = launches(network, args.recipe, args.batch, machine=Machine(cache=0))
    predicted = sum(x.bytes for x in model if x.layer not in ("head", "optimizer"))
    print(f"{sum(x.bytes for x in found) / 1e9:.2f} GB counted, {predicted / 1e9:.2f} GB predicted")


if __name__ == "__main__":
    main()
