"""The pictures of study 3, from its result."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fusedres.cli.study.panels import LOOKS, Panel, seeds_line

KINDS = {"residual": "residual, ReLU, BN", "plain": "plain, ReLU, BN"}


def histogram(axes: Axes, data: dict[str, Any], depth: str, form: str) -> None:
    """Classes down, blocks across; the share of a class's test images, over all seeds."""
    counts = np.sum([one["exits"] for one in data[depth][KINDS[form]]], axis=0)
    shares = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    last = shares.shape[1] - 1
    ticks = sorted({*range(0, last, max(1, last // 8)), last})
    axes.set_xticks(ticks, [str(t + 1) if t < last else f">{last}" for t in ticks])
    axes.set_yticks(range(len(shares)))
    axes.set(title=f"{form}, depth {depth}: right for good from", xlabel=f"block (>{last}: never)")
    axes.set_ylabel("class")
    axes.figure.colorbar(image, ax=axes, label="images of the class (%)")


def probes(axes: Axes, data: dict[str, Any], depth: str) -> None:
    for form, kind in KINDS.items():
        seeds = [[100 * e for e in one["probe_error"]] for one in data[depth][kind]]
        seeds_line(axes, list(range(1, len(seeds[0]) + 1)), seeds, LOOKS[form], form)
    axes.set(title=f"linear probes, depth {depth}", xlabel="block (1: nearest to the image)")
    axes.set_ylabel("test error (%)")
    axes.grid(alpha=0.25)
    axes.legend()


def moves(axes: Axes, data: dict[str, Any], depth: str, what: str, label: str) -> None:
    for form, kind in KINDS.items():
        rows = [{row["block"]: row[what] for row in one["moves"]} for one in data[depth][kind]]
        common = sorted(set.intersection(*(set(row) for row in rows)))
        seeds = [[row[block] for block in common] for row in rows]
        seeds_line(axes, [block + 1 for block in common], seeds, LOOKS[form], form)
    axes.set(title=f"images already right, depth {depth}", xlabel="block (1: nearest to the image)")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.legend()


def lesions(axes: Axes, data: dict[str, Any], depth: str) -> None:
    """A dot a lesion and seed; the whole network's error as a line."""
    groups = {"single": "one\nremoved", "pairs": "two\nremoved", "swaps": "two\nswapped"}
    for offset, (form, kind) in zip((-0.16, 0.16), KINDS.items(), strict=True):
        look, found = LOOKS[form], data[depth][kind]
        for place, what in enumerate(groups):
            values = [100 * row[-1] for one in found for row in one["lesions"][what]]
            x = place + offset + np.linspace(-0.11, 0.11, len(values))
            axes.scatter(x, values, s=12, marker=look["marker"], color=look["color"], alpha=0.6, linewidths=0)
        whole = 100 * float(np.mean([one["lesions"]["whole"] for one in found]))
        axes.axhline(
            whole, color=look["color"], linestyle=look["linestyle"], linewidth=1, label=f"{form}, whole"
        )
    axes.set_xticks(range(len(groups)), groups.values())
    axes.set(title=f"lesions, depth {depth}", ylabel="test error (%)")
    axes.set_ylim(-2, 100)
    axes.grid(axis="y", alpha=0.25)
    axes.legend()


def of_depth(data: dict[str, Any], depth: str) -> list[Panel]:
    return [
        *(
            Panel(
                f"exits-{form}-{depth}",
                f"First block from which an image's class is right and stays so, by class: {form}, depth {depth}",
                partial(histogram, data=data, depth=depth, form=form),
            )
            for form in KINDS
        ),
        Panel(
            f"lesions-{depth}",
            f"Test error with blocks removed or swapped, depth {depth}, residual and plain",
            partial(lesions, data=data, depth=depth),
        ),
        Panel(
            f"probes-{depth}",
            f"Test error of a linear probe after each block, depth {depth}, residual and plain",
            partial(probes, data=data, depth=depth),
        ),
        *(
            Panel(
                f"{what}-{depth}",
                f"{label} by block, of images that were right before it, depth {depth}, residual and plain",
                partial(moves, data=data, depth=depth, what=what, label=label),
            )
            for what, label in (
                ("ratio", "||F(x)|| / ||x||"),
                ("cosine", "cosine of F(x) and x"),
                ("kept", "cosine of the block's output and input"),
            )
        ),
    ]


def panels(data: dict[str, Any]) -> list[Panel]:
    return [panel for depth in data for panel in of_depth(data, depth)]


def shown(data: dict[str, Any]) -> list[Panel]:
    return of_depth(data, next(iter(data)))[:3]
