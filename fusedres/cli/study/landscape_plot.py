"""The pictures of study 4, from its result."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from fusedres.cli.study.exits_plot import KINDS
from fusedres.cli.study.panels import LOOKS, Panel, log_scale

LEVELS = 18
REACH = 1.0
FIGURES = (
    ("largest eigenvalue", lambda one: one["largest"], "1 / (weight)^2, logarithmic"),
    ("negative curvature", lambda one: 100 * one["negative_curvature"], "of the sum of |eigenvalues| (%)"),
    ("curves downwards", lambda one: 100 * one["negative"], "points (%)"),
    ("roughness", lambda one: 100 * one["roughness"], "variance left by a quadratic (%)"),
)


def contours(axes: Axes, data: dict[str, Any], depth: str, form: str, low: float, high: float) -> None:
    """The first seed's surface; colours mean the same loss in every picture of the study."""
    values = np.clip(np.array(data[depth][KINDS[form]][0]["surface"]), low, high)
    grid = np.linspace(-REACH, REACH, len(values))
    levels = np.geomspace(low, high, LEVELS)
    drawn = axes.contourf(grid, grid, values.T, levels=levels, norm=LogNorm(low, high), cmap="cividis")
    axes.contour(grid, grid, values.T, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
    axes.plot(0, 0, marker="+", color="white", markersize=9)
    axes.set(title=f"{form}, depth {depth}", xlabel="first direction (filter norms)", aspect="equal")
    axes.set_ylabel("second direction (filter norms)")
    ticks = [t for t in (0.001, 0.01, 0.1, 1, 10, 100, 1000) if low <= t <= high]
    bar = axes.figure.colorbar(drawn, ax=axes, label="loss (nats)", ticks=ticks)
    bar.ax.set_yticklabels([f"{t:g}" for t in ticks])
    bar.ax.minorticks_off()


def dots(axes: Axes, data: dict[str, Any], title: str, value: Any, label: str) -> None:
    """A dot a seed, by depth."""
    for offset, form in zip((-0.12, 0.12), KINDS, strict=True):
        look: dict[str, Any] = {name: LOOKS[form][name] for name in ("color", "marker")}
        for place, depth in enumerate(data):
            found = [value(one) for one in data[depth][KINDS[form]]]
            name = form if place == 0 else None
            axes.scatter(
                [place + offset] * len(found), found, s=34, alpha=0.75, linewidths=0, label=name, **look
            )
    axes.set_xticks(range(len(data)), [f"depth {depth}" for depth in data])
    axes.set_xlim(-0.6, len(data) - 0.4)
    axes.set(title=f"{title}, a dot a seed", ylabel=label)
    if "logarithmic" in label:
        log_scale(axes)
    else:
        axes.set_ylim(0, None)
    axes.grid(axis="y", alpha=0.25)
    axes.legend()


def surfaces(data: dict[str, Any]) -> list[Panel]:
    found = np.concatenate(
        [np.ravel(one["surface"]) for depth in data.values() for seeds in depth.values() for one in seeds[:1]]
    )
    low = max(float(found.min()), 1e-3)
    high = max(min(float(np.quantile(found, 0.98)), 1e3), 10 * low)
    return [
        Panel(
            f"surface-{form}-{depth}",
            f"Loss along two filter-normalised directions around the trained {form} network of depth {depth}",
            partial(contours, data=data, depth=depth, form=form, low=low, high=high),
        )
        for depth in data
        for form in KINDS
    ]


def panels(data: dict[str, Any]) -> list[Panel]:
    figures = [
        Panel(
            title,
            f"{title} by depth, residual and plain, a dot a seed",
            partial(dots, data=data, title=title, value=value, label=label),
        )
        for title, value, label in FIGURES
    ]
    return [*surfaces(data), *figures]


def shown(data: dict[str, Any]) -> list[Panel]:
    deepest = max(data, key=int)
    found = {panel.name: panel for panel in panels(data)}
    return [
        found[f"surface-residual-{deepest}"],
        found[f"surface-plain-{deepest}"],
        found["largest eigenvalue"],
    ]
