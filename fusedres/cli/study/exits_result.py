"""What study 3 found: at which blocks images are recognised, how far blocks move them, what a lost block costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedres.cli.study import exits, networks, training
from fusedres.cli.study.figures import claim, percent, said, spread
from fusedres.cli.study.networks import Kind
from fusedres.cli.study.settings import Settings

Seeds = list[dict[str, Any]]


def harm(one: dict[str, Any], what: str) -> float:
    """By how much the test error rises, on average over the lesions of that sort."""
    return float(np.mean([row[-1] for row in one["lesions"][what]])) - one["lesions"]["whole"]


def kept(one: dict[str, Any]) -> float:
    """Cosine of a block's output and its input, over blocks, of images that were right before it."""
    return float(np.mean([row["kept"] for row in one["moves"]]))


def deciles(one: dict[str, Any]) -> tuple[int, int]:
    """The exits of the earliest and of the latest tenth of the images that have one, counted from 1."""
    counts = np.array(one["exits"]).sum(0)[:-1]
    places = np.repeat(np.arange(1, len(counts) + 1), counts)
    low, high = np.quantile(places, [0.1, 0.9], method="nearest")
    return int(low), int(high)


class Found:
    """The results at one depth, by kind."""

    def __init__(self, settings: Settings, results: dict[str, Any], depth: int) -> None:
        self.settings, self.results, self.depth = settings, results, depth

    def seeds(self, kind: Kind) -> Seeds:
        return [self.results[f"exits-{training.key(kind, self.depth, seed)}"] for seed in self.settings.seeds]


def claims(found: Found) -> list[dict[str, Any]]:
    both = [found.seeds(kind) for kind in exits.KINDS]
    pairs = list(zip(*both, strict=True))
    at = f"at depth {found.depth}"

    def each(value: Any) -> list[str]:
        return [percent(spread(map(value, seeds))) for seeds in both]

    def plainly(value: Any) -> list[str]:
        return [said(spread(map(value, seeds))) for seeds in both]

    ends = [[deciles(one) for one in seeds] for seeds in both]
    spans = ["; ".join(f"{low} to {high}" for low, high in seeds) for seeds in ends]
    lost, blocks = each(lambda one: one["lost"]), both[0][0]["blocks"]
    moved, ratio = plainly(kept), plainly(lambda one: np.mean([row["ratio"] for row in one["moves"]]))
    harms = {what: each(lambda one, what=what: harm(one, what)) for what in ("single", "pairs", "swaps")}
    return [
        claim(
            f"The best depth differs from image to image, {at}",
            [low < high for low, high in ends[0]],
            f"Of {blocks} blocks, the earliest tenth and the latest tenth of the test images are right for good from "
            f"blocks {spans[0]} on (residual, seed by seed), {spans[1]} (plain).",
        ),
        claim(
            f"More blocks spoil features that were good enough, less so with shortcuts, {at}",
            [a["lost"] < b["lost"] for a, b in pairs],
            f"A probe after an earlier block gets {lost[0]} of the test images right, and the last one wrong, in the "
            f"residual network, {lost[1]} in the plain one.",
        ),
        claim(
            f"A residual block moves a feature that is right less than a plain block does, {at}",
            [kept(a) > kept(b) for a, b in pairs],
            f"The cosine of a block's output and its input is {moved[0]} residual, {moved[1]} plain; ||F(x)|| is "
            f"{ratio[0]} and {ratio[1]} times ||x||.",
        ),
        claim(
            f"A residual network loses less with a block than a plain one, {at}",
            [harm(a, "single") < harm(b, "single") for a, b in pairs],
            f"Without one block the test error rises by {harms['single'][0]} residual, {harms['single'][1]} plain; "
            f"without two by {harms['pairs'][0]} and {harms['pairs'][1]}; with two swapped by {harms['swaps'][0]} and "
            f"{harms['swaps'][1]}, on average over all blocks that keep their input's shape.",
        ),
    ]


def table(found: list[Found]) -> list[list[str]]:
    rows = [
        ["network", "depth", "test error", "one removed", "two removed", "two swapped", "last probe's error"]
    ]
    for depth in found:
        for kind in exits.KINDS:
            seeds = depth.seeds(kind)
            cells = [percent(spread(one["lesions"]["whole"] for one in seeds))]
            for what in ("single", "pairs", "swaps"):
                cells.append(percent(spread(one["lesions"]["whole"] + harm(one, what) for one in seeds)))
            last = percent(spread(one["probe_error"][-1] for one in seeds))
            rows.append([kind.name, str(depth.depth), *cells, last])
    return rows


def summary(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    found = [Found(settings, results, depth) for depth in settings.exit_depths]
    return {
        "title": "Where images are recognised",
        "table_title": "Test errors, whole and with blocks removed or swapped: mean [least, largest] of the seeds",
        "table": table(found),
        "claims": [one for depth in found for one in claims(depth)],
        "notes": [
            "Probes are logistic regressions on every block's output, averaged over space. Lesions leave out or swap "
            f"blocks whose input and output have one shape, of the {networks.RESIDUAL.name} network and its plain twin."
        ],
        "data": {str(f.depth): {kind.name: f.seeds(kind) for kind in exits.KINDS} for f in found},
    }
