"""Draws the plots of the documentation from the committed results, `bench/results/*/*.json`, and from nothing else.

As a hook of MkDocs it adds them to the site while that is built. `python docs/plots.py` draws the one that README.md
shows anew, `docs/pages/speed.svg`. Cells that lose are drawn like all others.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
README_PLOT = ROOT / "docs/pages/speed.svg"
FUSED, OTHER, LOSES = "#00796b", "#757575", "#c62828"
STYLE = {
    "svg.hashsalt": "fusedres",  # the same numbers give the same file
    "svg.fonttype": "none",  # text stays text: small files, and no font to load
    "font.family": ["sans-serif"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
MACHINES = (  # the columns of the tables in docs/pages/benchmarks.md
    ("AMD Zen 5, float32", "cpu_avx512_zen5/{}_float32"),
    ("AMD Zen 5, bfloat16", "cpu_avx512_zen5/{}_bfloat16"),
    ("Intel Emerald Rapids, float32", "cpu_avx512_amx/{}_float32"),
    ("Intel Cascade Lake, float32", "cpu_avx512_intel/{}_float32"),
    ("AMD Zen 3, float32", "cpu/{}_batch16"),
    ("AMD Zen 4, float32", "cpu_avx512/{}_float32"),
    ("AMD Zen 4, bfloat16", "cpu_avx512/{}_bfloat16"),
)
# the README beside these files says why a first run was disturbed, and is read in its second one
RERUN = {
    ("cpu_avx512_intel/headline_float32", "resnet50", "train"): "cpu_avx512_intel/headline_float32_again"
}
CASES = (
    ("ResNet-50, training step", "resnet50", "train"),
    ("ResNet-18, training step", "resnet18", "train"),
    ("ResNet-50, inference", "resnet50", "infer"),
    ("ResNet-18, inference", "resnet18", "infer"),
)


def read(file: str) -> Any:
    return json.loads((RESULTS / f"{file}.json").read_text())


def throughput(file: str, model: str, phase: str, implementation: str) -> dict[str, float] | None:
    """One cell of a run of `pytest bench`, or None where that run had no such cell."""
    found = read(RERUN.get((file, model, phase), file))["benchmarks"]
    name = f"test_throughput[{model}-{phase}-{implementation}]"
    return next((cell["extra_info"] for cell in found if cell["name"] == name), None)


def interval(axes: Axes, y: float, cell: dict[str, float], color: str, marker: str) -> None:
    """A ratio with its 95 % interval; red where the ratio is below 1."""
    color = LOSES if cell["ratio"] < 1 and color == FUSED else color
    axes.plot([cell["ratio_low"], cell["ratio_high"]], [y, y], color=color, linewidth=1.4)
    axes.plot(cell["ratio"], y, marker, color=color, markersize=5)


def rows(axes: Axes, labels: Iterable[tuple[float, str]]) -> None:
    places, names = zip(*labels, strict=True)
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.25)
    if not axes.yaxis_inverted():  # panels that share their rows are turned together
        axes.invert_yaxis()


def speed() -> Figure:
    """Every model, phase and machine: against eager on the left, against torch.compile on the right."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 6.2), sharey=True)
    sides = (
        ("headline", "times as fast as eager", {"torch_compile": OTHER, "fusedres_auto": FUSED}),
        ("compiled_baseline", "times as fast as torch.compile", {"fusedres_auto": FUSED}),
    )
    for axes, (file, label, implementations) in zip(panels, sides, strict=True):
        labels, y = [], 0.0
        for title, model, phase in CASES:
            labels.append((y, title))
            for machine, pattern in MACHINES:
                y += 1
                labels.append((y, machine))
                for implementation, color in implementations.items():
                    cell = throughput(pattern.format(file), model, phase, implementation)
                    if cell is not None:
                        is_other = color == OTHER
                        interval(axes, y + 0.3 * is_other, cell, color, "s" if is_other else "o")
            y += 1.4
        rows(axes, labels)
        axes.set_xlabel(label)
    for tick in panels[0].get_yticklabels():
        if tick.get_text() in {title for title, *_ in CASES}:
            tick.set_fontweight("bold")
    keys = (("patched", "o", FUSED), ("patched, and slower", "o", LOSES), ("torch.compile", "s", OTHER))
    handles = [plt.Line2D([], [], marker=m, color=c, linestyle="", label=name) for name, m, c in keys]
    figure.legend(handles=handles, loc="upper center", ncols=3, frameon=False)
    figure.suptitle(" ", fontsize=8)
    return figure


def block_sizes() -> Figure:
    """Single blocks by the size of their input: why `auto` leaves small ones alone."""
    figure, panels = plt.subplots(2, 2, figsize=(9.6, 6.6), sharex=True, sharey="row")
    columns = (
        (
            "float32",
            (
                ("AMD Zen 3 (AVX2)", "cpu/block_sizes_{}", "oC3"),
                ("AMD Zen 4", "cpu_avx512/block_sizes_{}_float32", "sC0"),
                ("Intel Emerald Rapids", "cpu_avx512_amx/block_sizes_{}_float32", "vC2"),
                ("Intel Cascade Lake", "cpu_avx512_intel/block_sizes_{}_float32", "^C4"),
                ("AMD Zen 5", "cpu_avx512_zen5/block_sizes_{}_float32", "DC1"),
            ),
        ),
        (
            "bfloat16 autocast",
            (
                ("AMD Zen 4", "cpu_avx512/block_sizes_{}_bfloat16", "sC0"),
                ("AMD Zen 5", "cpu_avx512_zen5/block_sizes_{}_bfloat16", "DC1"),
            ),
        ),
    )
    for row, (phase, name) in enumerate((("train", "training step"), ("infer", "inference"))):
        for column, (dtype, machines) in enumerate(columns):
            axes = panels[row][column]
            for machine, pattern, look in machines:
                cells = read(pattern.format(phase))["cells"]
                axes.scatter(
                    [cell["elements"] for cell in cells],
                    [cell["ratio"] for cell in cells],
                    s=16,
                    marker=look[0],
                    color=look[1:],
                    alpha=0.75,
                    label=machine,
                    linewidths=0,
                )
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set(xscale="log", title=f"{name}, {dtype}")
            axes.grid(alpha=0.25)
            if column == 0:
                axes.set_ylabel("times as fast as eager")
            if row == 1:
                axes.set_xlabel("elements of the block's input")
    panels[0][0].legend(frameon=False, fontsize=8)
    return figure


def recipes() -> Figure:
    """ResNet-50 on the CPU where every recipe was measured, `gram` and the NCHW layout included."""
    figure, axes = plt.subplots(figsize=(9.6, 3.4))
    names = {
        "fusedres_auto": "auto",
        "fusedres_separate": "separate",
        "fusedres_gram": "gram",
        "torch_compile": "torch.compile, unpatched",
        "eager_nchw": "eager in NCHW, unpatched",
    }
    labels, y = [], 0
    for title, model, phase in CASES:
        for implementation, name in names.items():
            cell = throughput("cpu/recipes_batch16", model, phase, implementation)
            if cell is not None:
                interval(axes, y, cell, FUSED if implementation.startswith("fusedres") else OTHER, "o")
                labels.append((y, f"{title}: {name}"))
                y += 1
    rows(axes, labels)
    axes.set_xlabel("times as fast as eager channels_last, AMD Zen 3, float32, batch 16")
    return figure


def kinds(file: str, separator: str, last: bool) -> dict[str, list[dict[str, Any]]]:
    """The cells of a file by the part of their name before the separator, or after it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, cell in read(file)["cells"].items():
        head, _, tail = name.partition(separator)
        found.setdefault(tail if last else head, []).append(cell)
    return found


def strips(axes: Axes, groups: dict[str, list[dict[str, Any]]], value: str) -> None:
    """One row a kind, one dot a shape."""
    for y, cells in enumerate(groups.values()):
        values = [cell[value] for cell in cells]
        colors = [LOSES if v < 1 and value == "ratio" else FUSED for v in values]  # no op has to beat a copy
        axes.scatter(values, [y] * len(values), s=18, c=colors, alpha=0.7, linewidths=0)
    rows(axes, enumerate(groups))


def convolutions() -> Figure:
    """The kernels of this package against the library's, shape by shape."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.4), sharey=True)
    for axes, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
        strips(axes, kinds(f"cpu_avx512_zen5/convolutions_{dtype}", ", ", False), "ratio")
        axes.set(title=f"AMD Zen 5, {dtype}", xlabel="times as fast as oneDNN")
    return figure


def ops() -> Figure:
    """Ops that only move memory, against a copy of as many bytes."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.6), sharey=True)
    files = (("AMD Zen 5", "cpu_avx512_zen5/ops_float32"), ("AMD Zen 3", "cpu/ops_float32"))
    for axes, (machine, file) in zip(panels, files, strict=True):
        strips(axes, kinds(file, "/", True), "of_copy")
        axes.set(title=f"{machine}, float32", xlabel="bytes a second, over those of a copy", xlim=(0, 1.2))
    return figure


PLOTS: dict[str, Callable[[], Figure]] = {
    "speed": speed,
    "block_sizes": block_sizes,
    "recipes": recipes,
    "convolutions": convolutions,
    "ops": ops,
}


def digest() -> str:
    """Of every committed result: what says that a drawing is of these and no others."""
    found = hashlib.sha256()
    for file in sorted(RESULTS.glob("cpu*/*.json")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def svg(name: str) -> str:
    with matplotlib.rc_context(STYLE):
        figure = PLOTS[name]()
        figure.tight_layout()
        stream = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Description": f"results {digest()}"}
        figure.savefig(stream, format="svg", metadata=metadata)
        plt.close(figure)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """MkDocs calls this once it has found the pages."""
    from mkdocs.structure.files import File

    for name in PLOTS:
        if f"{name}.svg" not in files.src_uris:  # the one of README.md is there
            files.append(File.generated(config, f"{name}.svg", content=svg(name)))
    return files


if __name__ == "__main__":
    README_PLOT.write_text(svg("speed"))
