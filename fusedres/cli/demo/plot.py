"""The demo's pictures: loss curves of the runs and how far apart they are; what patching gains, with intervals."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from fusedres.cli.demo.speed import Line
from fusedres.cli.demo.training import Run

STYLES = (("#1f77b4", "-", 2.6), ("#2ca02c", "--", 1.6), ("#d62728", ":", 1.8))


def difference(a: Run, b: Run) -> list[float]:
    return [abs(p - q) for p, q in zip(a.losses, b.losses, strict=True)]


def plot_curves(results: dict[str, list[Run]], path: Path) -> None:
    """Per model, on top the loss of every run, below the distance of each run from the first. Writes a PNG."""
    figure, axes = plt.subplots(2, len(results), figsize=(6.4 * len(results), 7), squeeze=False, sharex="col")
    for column, (title, runs) in enumerate(results.items()):
        top, bottom = axes[0][column], axes[1][column]
        for run, (color, line, width) in zip(runs, STYLES, strict=False):
            top.plot(run.losses, line, color=color, linewidth=width, label=run.label)
        for run, (color, _, _) in zip(runs[1:], STYLES[1:], strict=False):
            bottom.plot(
                difference(runs[0], run), color=color, linewidth=1, label=f"|{run.label} - {runs[0].label}|"
            )
        top.set(title=title, ylabel="training loss", yscale="log")
        bottom.set(xlabel="step", ylabel="distance of the losses", yscale="log")
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
            axis.legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_gains(lines: list[Line], title: str, path: Path) -> None:
    """A bar for each line, with its interval, from the first on top; 1.0 is marked. Writes a PNG."""
    figure, axis = plt.subplots(figsize=(9, 0.6 * len(lines) + 1.6))
    shown = lines[::-1]
    names, gains = [line.what for line in shown], [line.gain for line in shown]
    reach = [[line.gain - line.low for line in shown], [line.high - line.gain for line in shown]]
    colors = ["#d62728" if line.is_below else "#1f77b4" for line in shown]
    axis.barh(names, gains, xerr=reach, color=colors, capsize=4)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_xlabel("unpatched / patched: above 1 the patched model is better")
    axis.set_title(title.replace(", on ", ",\non "), fontsize=9)  # one line is wider than the picture
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
