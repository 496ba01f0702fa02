"""Bytes, FLOPs and the shortest possible time of a ResNet's training step, for every way to schedule it.

    python bench/roofline.py [MODEL] [--batch 256] [--ceilings environment.json] [--launches SCHEDULE]

Each launch of `schedules.py` takes max(bytes / bandwidth, FLOPs / peak): every operand moves once, nothing
waits. That is arithmetic, not measurement: a floor to hold measured times against.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from layers import Block, Conv, Network, read_network
from schedules import SCHEDULES, Line

from fusedres.triton_kernels.tiles import dc_comes_first

MOMENTUM_SGD_BYTES = (
    5 * 4 + 2
)  # float32 weight and momentum read and written, gradient read; low-precision copy


@dataclass(frozen=True)
class Machine:
    """The two ceilings, and the size below which a second read is served by the L2 cache."""

    bandwidth: float = 4.3e12  # bytes/s, read and written
    peak: float = 790e12  # FLOP/s
    cache: float = 40e6  # bytes

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which a launch is bound by arithmetic."""
        return self.peak / self.bandwidth


@dataclass(frozen=True)
class Launch:
    layer: str
    kernel: str
    bytes: float
    flops: float

    def seconds(self, machine: Machine) -> float:
        return max(self.bytes / machine.bandwidth, self.flops / machine.peak)


@dataclass(frozen=True)
class Totals:
    launches: int
    bytes: float
    flops: float
    seconds: float
    bandwidth_bound: int


@dataclass(frozen=True)
class Place:
    """Where a line of a schedule is launched: a convolution (at a join, the block's last) and its tags."""

    conv: Conv
    tags: frozenset[str]
    block: Block | None = None
    pooled: int = 0


def places(network: Network) -> Iterator[Place]:
    pooling = network.pooled != network.stem.cout * network.stem.h * network.stem.w
    yield Place(network.stem, frozenset({"stem"}), None, network.pooled)
    yield Place(network.stem, frozenset({"pool" if pooling else "unpooled"}), None, network.pooled)
    for index, block in enumerate(network.blocks):
        common = {
            "projection" if block.projection else "identity",
            "later" if index else "opening",
            "final" if index == len(network.blocks) - 1 else "earlier",
        }
        for i, conv in enumerate(block.main):
            position = {"main", "upper" if i else "first", "last" if i == len(block.main) - 1 else "inner"}
            yield Place(conv, frozenset(common | position | conv_tags(conv)), block)
        if block.projection is not None:
            yield Place(
                block.projection, frozenset(common | {"shortcut"} | conv_tags(block.projection)), block
            )
        yield Place(block.main[-1], frozenset(common | {"join"}), block)


def conv_tags(conv: Conv) -> set[str]:
    kernel = {"conv", "1x1" if conv.pointwise else "kxk", "strided" if conv.strided else "plain"}
    return kernel | {"many_tiles" if dc_comes_first(conv.cin, conv.cout) else "few_tiles"}


def tensor_bytes(token: str, place: Place, batch: int, element: int) -> float:
    """Bytes of a tensor that a schedule names, see the head of `schedules.py`."""
    name = token.lstrip("~")
    conv, block = place.conv, place.block
    inputs, outputs = conv.cin * conv.h_in * conv.w_in, conv.cout * conv.h * conv.w
    sampled = conv.cin * conv.h * conv.w if conv.pointwise else inputs
    if name in ("in", "din", "below"):
        return batch * inputs * element
    if name in ("c", "dc", "a", "da", "dz"):
        return batch * outputs * element
    if name == "sampled":
        return batch * sampled * element
    if name == "w":
        return conv.weights * element
    if name == "dw":
        return conv.weights * 4
    if name in ("p", "dp", "index8", "index1"):
        return batch * place.pooled * {"index8": 8, "index1": 1}.get(name, element)
    assert block is not None, f"{token} outside a block"
    x = block.main[0].cin * block.main[0].h_in * block.main[0].w_in
    y = block.main[-1].cout * block.main[-1].h * block.main[-1].w
    if name == "shortcut_dx":
        assert block.projection is not None
        return batch * block.projection.cin * block.projection.h * block.projection.w * element
    bits = {"mask": y / 8, "mask_x": x / 8}
    if name in bits:
        return batch * bits[name]
    elements = {"x": x, "dx": x, "y": y, "dy": y, "dz_y": y, "x_or_s": y, "s": y, "ds": y}
    return batch * elements[name] * element


def work_flops(work: str, conv: Conv, batch: int) -> float:
    rows = batch * conv.h * conv.w
    flops = {
        "conv": 2 * rows * conv.weights,
        "gram": rows * conv.cin**2,
        "square": 2 * rows * conv.cin**2,
    }
    return sum(flops[w] for w in work.split())


def line_launch(line: Line, place: Place, batch: int, element: int, cache: float) -> Launch:
    _, kernel, reads, writes, work = line
    moved = 0.0
    for token in (*reads.split(), *writes.split()):
        size = tensor_bytes(token, place, batch, element)
        moved += 0 if token.startswith("~") and size <= cache else size
    return Launch(place.conv.name, kernel, moved, work_flops(work, place.conv, batch))


def head_launches(network: Network, batch: int, element: int) -> list[Launch]:
    """Average pooling, classifier and optimiser, the same in every schedule."""
    last = network.blocks[-1].main[-1]
    features, maps = batch * network.features, batch * network.features * last.h * last.w
    weights, logits = network.features * network.classes, batch * network.classes
    flops = 2.0 * features * network.classes
    return [
        Launch("head", "average_pool", (maps + features) * element, 0),
        Launch("head", "linear", (features + weights + logits) * element, flops),
        Launch("head", "linear_backward", (2 * features + 2 * weights + 2 * logits) * element, 2 * flops),
        Launch("head", "average_pool_backward", (maps + features) * element, 0),
        Launch("optimizer", "sgd", network.parameters * MOMENTUM_SGD_BYTES, 0),
    ]


def launches(
    network: Network, schedule: str, batch: int, element: int = 2, machine: Machine | None = None
) -> list[Launch]:
    """Every launch of one training step.

    Raises:
        KeyError: no such schedule.
    """
    stem, expansion, other = SCHEDULES[schedule]
    cache = (machine or Machine()).cache
    found = []
    for place in places(network):
        lines = stem if place.block is None else expansion if place.block.has_expansion else other
        matching = (line for line in lines if place.tags.issuperset(line[0].split()))
        found += [line_launch(line, place, batch, element, cache) for line in matching]
    return found + head_launches(network, batch, element)


def totals(found: list[Launch], machine: Machine) -> Totals:
    return Totals(
        len(found),
        sum(launch.bytes for launch in found),
        sum(launch.flops for launch in found),
        sum(launch.seconds(machine) for launch in found),
        sum(
            launch.flops > 0 and launch.flops / machine.peak < launch.bytes / machine.bandwidth
            for launch in found
        ),
    )


def machine_from(path: Path) -> Machine:
    """The ceilings that the report's `environment` stage measured."""
    cells = json.loads(path.read_text())["cells"]
    return Machine(
        bandwidth=cells["copy_bandwidth"]["result"]["bytes_per_second"],
        peak=cells["matmul_rate/bfloat16"]["result"]["flops_per_second"],
    )


def main() -> None:
    from fusedres import models

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="resnet50", choices=sorted(models.MODELS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--element", type=int, default=2, help="bytes of an activation's element")
    parser.add_argument("--ceilings", type=Path, help="environment.json of a report")
    parser.add_argument("--launches", choices=sorted(SCHEDULES), help="list every launch of one schedule")
    args = parser.parse_args()

    side = 32 if args.model.startswith("cifar") else 224
    network = read_network(args.model, models.create(args.model), (3, side, side))
    machine = machine_from(args.ceilings) if args.ceilings else Machine()
    print(
        f"{args.model}, batch {args.batch}, {args.element} bytes an element, "
        f"{machine.bandwidth / 1e12:.2f} TB/s, {machine.peak / 1e12:.0f} TFLOP/s, "
        f"ridge {machine.ridge:.0f} FLOP/byte"
    )
    if args.launches:
        for launch in launches(network, args.launches, args.batch, args.element, machine):
            seconds = launch.seconds(machine)
            print(
                f"{launch.layer:24} {launch.kernel:44} {launch.bytes / 1e6:9.1f} MB "
                f"{launch.flops / 1e9:9.1f} GFLOP {seconds * 1e6:8.1f} us"
            )
        return
    print(f"{'schedule':26} {'launches':>8} {'GB':>8} {'TFLOP':>7} {'ms':>8} {'images/s':>9}")
    for name in SCHEDULES:
        t = totals(launches(network, name, args.batch, args.element, machine), machine)
        print(
            f"{name:26} {t.launches:8} {t.bytes / 1e9:8.2f} {t.flops / 1e12:7.2f} {t.seconds * 1e3:8.2f} "
            f"{args.batch / t.seconds:9.0f}"
        )


if __name__ == "__main__":
    main()
