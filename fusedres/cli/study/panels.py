"""Pictures as panels: what one of them shows, drawn on axes; many of them as one file, or each as its own."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's colours, told apart by all; line and marker tell them apart in grey too
BLUE, RED, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
LOOKS: dict[str, dict[str, Any]] = {
    "plain": {"color": RED, "marker": "s", "linestyle": "--"},
    "residual": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "sum": {"color": GREEN, "marker": "^", "linestyle": "-."},
}
STYLE: Any = {
    "svg.hashsalt": "fusedres",  # the same numbers give the same file
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "legend.fontsize": 9,
    "legend.frameon": False,
}
WIDTH, HEIGHT = 4.2, 3.3  # inches of one panel: legible on a screen that is 400 pixels wide
COLUMNS = 3


class Panel(NamedTuple):
    """One picture: `says` is its text for those who do not see it."""

    name: str
    says: str
    draw: Callable[[Axes], None]


def composed(panels: list[Panel], columns: int = COLUMNS) -> Figure:
    """All panels in rows. To be drawn and saved within `STYLE`."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH * columns, HEIGHT * rows), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel.draw(axis)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    figure.tight_layout()
    return figure


def png(panels: list[Panel]) -> bytes:
    stream = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = composed(panels)
        figure.savefig(stream, format="png", dpi=110)
        plt.close(figure)
    return stream.getvalue()


def svg(panels: list[Panel], columns: int = COLUMNS, **metadata: str) -> str:
    """The same numbers give the same text."""
    stream = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = composed(panels, columns)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, **metadata})
        plt.close(figure)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def seeds_line(axes: Axes, x: list[Any], seeds: list[list[float]], look: dict[str, Any], label: str) -> None:
    """The mean of the seeds as a line, from the least to the largest as a band."""
    columns = list(zip(*seeds, strict=True))
    means = [sum(column) / len(column) for column in columns]
    axes.plot(x, means, label=label, markersize=4, linewidth=1.6, **look)
    axes.fill_between(
        x, [min(c) for c in columns], [max(c) for c in columns], color=look["color"], alpha=0.18, lw=0
    )


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis whose labels are powers of ten, or plain numbers where it is less than two decades."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 100:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
