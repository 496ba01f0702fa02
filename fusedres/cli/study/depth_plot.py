"""The pictures of study 2, from its result."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from fusedres.cli.study.panels import LOOKS, ORANGE, PURPLE, Panel, log_scale, seeds_line

KINDS = {
    "residual, ReLU, BN": ("residual, BN", LOOKS["residual"]),
    "plain, ReLU, BN": ("plain, BN", LOOKS["plain"]),
    "residual, ReLU, no BN": ("residual, no BN", {"color": PURPLE, "marker": "v", "linestyle": ":"}),
    "plain, ReLU, no BN": ("plain, no BN", {"color": ORANGE, "marker": "D", "linestyle": "-."}),
}
SMOOTHED = 10  # steps


def against_depth(axes: Axes, data: dict[str, Any], what: str, title: str) -> None:
    for kind, (label, look) in KINDS.items():
        depths = sorted(map(int, data[kind]))
        columns = [[100 * one[what] for one in data[kind][str(d)]] for d in depths]
        seeds_line(axes, depths, [list(seed) for seed in zip(*columns, strict=True)], look, label)
    axes.set(title=title, xlabel="depth (layers)", ylabel="error (%)", xticks=depths)
    axes.set_ylim(-2, 128)  # room for the legend
    axes.set_yticks(range(0, 101, 20))
    axes.grid(alpha=0.25)
    axes.legend(ncols=2, loc="upper center")


def curves(axes: Axes, data: dict[str, Any]) -> None:
    depths = sorted(map(int, data["plain, ReLU, BN"]))
    for kind in ("residual, ReLU, BN", "plain, ReLU, BN"):
        label, look = KINDS[kind]
        for depth, alpha in ((depths[0], 0.45), (depths[-1], 1.0)):
            seeds = [smooth(one["losses"]) for one in data[kind][str(depth)]]
            mean = [sum(c) / len(c) for c in zip(*seeds, strict=True)]
            style: dict[str, Any] = {"color": look["color"], "linestyle": look["linestyle"], "alpha": alpha}
            axes.plot(range(SMOOTHED, SMOOTHED + len(mean)), mean, label=f"{label}, depth {depth}", **style)
    log_scale(axes)
    axes.set(title="training loss, mean of the seeds", xlabel="training step")
    axes.set_ylabel(f"cross-entropy (nats),\nmean of {SMOOTHED} steps")
    axes.set_ylim(axes.get_ylim()[0] / 12, None)  # room for the legend
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left")


def smooth(losses: list[float | None]) -> list[float]:
    """Means of that many steps; None stands for what was no finite number, and is not drawn."""
    values = [math.nan if loss is None else loss for loss in losses]
    return [sum(values[i : i + SMOOTHED]) / SMOOTHED for i in range(len(values) - SMOOTHED + 1)]


def panels(data: dict[str, Any]) -> list[Panel]:
    return [
        Panel(
            what,
            f"{title} against depth, plain and residual, with and without BN",
            partial(against_depth, data=data, what=what, title=title),
        )
        for what, title in (("training_error", "training error"), ("test_error", "test error"))
    ] + [Panel("losses", "Training loss, plain and residual, shallow and deep", partial(curves, data=data))]


shown = panels
