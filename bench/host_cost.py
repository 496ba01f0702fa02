"""What the host pays for a patched block: one training step at 1x1 spatial size, against the unpatched block.

    python bench/host_cost.py [--rounds 60] [--model] [--device gpu-stand-in]

There is next to no arithmetic at 1x1, so the ratio is that of Python and dispatch alone. `--model` adds whole small
models, which recipe "auto" must not make slower. `--device gpu-stand-in` takes the path of a GPU, with none: whole
ResNets, for whose kernels Triton's compiler and launcher run. Rounds are interleaved in one process; a ratio above 1 is
a cost.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fusedres
from fusedres.measuring.timing import bootstrap_interval, interleave, median
from fusedres.models import BasicBlock, Bottleneck, cifar_resnet

CPU = torch.device("cpu")
CALLS = 20  # of a block, in one round
SHAPE = 8, 64, 1, 1  # of a block's input: as many values per channel as the Gram form asks for, and two more


class Case(NamedTuple):
    """A module and its input, and which recipes it is measured with."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    recipes: tuple[str, ...]
    calls: int


def projected(block: type[BasicBlock] | type[Bottleneck], cin: int, width: int) -> nn.Module:
    cout = width * block.expansion
    downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout))
    return block(cin, width, downsample=downsample)


BLOCKS = [
    Case("basic", lambda: BasicBlock(64, 64), SHAPE, ("auto", "unfused", "separate"), CALLS),
    Case(
        "basic, projection",
        lambda: projected(BasicBlock, 64, 32),
        SHAPE,
        ("auto", "unfused", "separate"),
        CALLS,
    ),
    Case(
        "bottleneck",
        lambda: Bottleneck(64, 16),
        SHAPE,
        ("auto", "unfused", "separate", "gram"),
        CALLS,
    ),
    Case(
        "bottleneck, projection",
        lambda: projected(Bottleneck, 64, 32),
        SHAPE,
        ("auto", "unfused", "separate", "gram"),
        CALLS,
    ),
]
MODELS = [
    Case("cifar_resnet20, batch 64", lambda: cifar_resnet(20), (64, 3, 32, 32), ("auto",), 1),
    Case("cifar_resnet20, batch 1", lambda: cifar_resnet(20), (1, 3, 32, 32), ("auto",), 1),
]


def steps(model: nn.Module, x: Tensor, backward: bool, calls: int) -> Callable[[], None]:
    """Forward, or forward and backward, `calls` times."""
    x = x.clone().requires_grad_()

    def run() -> None:
        for _ in range(calls):
            if not backward:
                with torch.no_grad():
                    model(x)
                continue
            model(x).sum().backward()
            x.grad = None
            for p in model.parameters():
                p.grad = None

    return run


def measure(case: Case, recipe: str, backward: bool, rounds: int) -> tuple[float, float, float, float, float]:
    """Seconds of one unpatched and one patched call, and their ratio with its 95 % interval."""
    torch.manual_seed(0)
    plain = case.build()
    patched = fusedres.patch(copy.deepcopy(plain), recipe=recipe)
    x = torch.randn(case.shape).to(memory_format=torch.channels_last)
    plain_run, patched_run = (steps(m, x, backward, case.calls) for m in (plain, patched))
    before, after = interleave(plain_run, patched_run, CPU, rounds)
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    return (
        median(before) / case.calls,
        median(after) / case.calls,
        median(ratios),
        *bootstrap_interval(ratios),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--model", action="store_true", help="whole small models instead of blocks")
    parser.add_argument("--device", choices=("cpu", "gpu-stand-in"), default="cpu")
    options = parser.parse_args()
    if options.device != "cpu":
        import gpu_stand_in
        from gpu_stand_in import steps

        steps.main(gpu_stand_in.install(), options.rounds)
        return
    table = Table(title="Times as long as unpatched (median of paired ratios, 95 % interval)")
    for column in ("module", "recipe", "step", "unpatched us", "patched us", "ratio"):
        table.add_column(column)
    for case in MODELS if options.model else BLOCKS:
        for recipe in case.recipes:
            for backward in (False, True):
                before, after, ratio, low, high = measure(case, recipe, backward, options.rounds)
                step = "forward and backward" if backward else "forward"
                cells = (f"{before * 1e6:.1f}", f"{after * 1e6:.1f}", f"{ratio:.3f} [{low:.3f} {high:.3f}]")
                table.add_row(case.name, recipe, step, *cells)
    Console(width=130).print(table)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
