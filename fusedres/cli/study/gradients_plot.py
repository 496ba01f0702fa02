"""The pictures of study 1, from its result."""

from __future__ import annotations

from functools import partial
from typing import Any

from matplotlib.axes import Axes

from fusedres.cli.study.panels import BLUE, LOOKS, ORANGE, Panel, log_scale, seeds_line

FORMS = {"plain": "plain", "residual": "residual", "sum": "y = F(x) + x"}
CASES = (
    ("ReLU, BN", "ReLU, with BN"),
    ("ReLU, no BN", "ReLU, without BN, He's start"),
    ("ReLU, no BN, torch's start", "ReLU, without BN, torch's start"),
    ("sigmoid, BN", "sigmoid, with BN"),
    ("sigmoid, no BN", "sigmoid, without BN"),
)
TINY = 1e-60  # the foot of an axis, where a norm is 0


def relative(one: dict[str, Any], value: str = "inputs") -> list[float]:
    return [max(v, 0.0) / max(one["last"], 1e-300) or TINY for v in one[value]]


def by_block(axes: Axes, data: dict[str, Any], depth: str, case: str, title: str) -> None:
    for form, label in FORMS.items():
        seeds = [relative(one) for one in data["start"][f"{form}, {case}"][depth]]
        look = {**LOOKS[form], "marker": ""}
        seeds_line(axes, list(range(1, len(seeds[0]) + 1)), seeds, look, label)
    axes.axhline(1, color="black", linewidth=0.7)
    log_scale(axes)
    axes.set(title=f"{title}, depth {depth}", xlabel="block (1: nearest to the image)")
    axes.set_ylabel("||dE/dx||, over that at the end")
    axes.grid(alpha=0.25)
    axes.legend()


def by_layer(axes: Axes, data: dict[str, Any], depth: str, case: str, title: str) -> None:
    """The gradient of every convolution's weights, over that of the last one's."""
    for form, label in FORMS.items():
        found = [one["weights"] for one in data["start"][f"{form}, {case}"][depth]]
        seeds = [[max(w, 0.0) / max(weights[-1], 1e-300) or TINY for w in weights] for weights in found]
        look = {**LOOKS[form], "marker": ""}
        seeds_line(axes, list(range(1, len(seeds[0]) + 1)), seeds, look, label)
    axes.axhline(1, color="black", linewidth=0.7)
    log_scale(axes)
    axes.set(title=f"weights, {title}, depth {depth}", xlabel="convolution (1: nearest to the image)")
    axes.set_ylabel("||dE/dw||, over that of the last")
    axes.grid(alpha=0.25)
    axes.legend()


def shares(axes: Axes, data: dict[str, Any], depth: str) -> None:
    found = data["start"]["residual, ReLU, BN"][depth]
    x = list(range(1, len(found[0]["shortcut"]) + 1))
    for part, color, line, label in (
        ("shortcut", BLUE, "-", "through the shortcut alone"),
        ("main", ORANGE, "--", "through F"),
    ):
        seeds_line(axes, x, [one[part] for one in found], {"color": color, "linestyle": line}, label)
    axes.set(title=f"residual, ReLU, BN, depth {depth}", xlabel="block (1: nearest to the image)")
    axes.set_ylabel("share of dE/dx")
    axes.set_ylim(-0.1, 1.1)
    axes.grid(alpha=0.25)
    axes.legend()


def training(axes: Axes, data: dict[str, Any], case: str) -> None:
    for form in ("plain", "residual"):
        found = data["training"][f"{form}, {case}"]
        steps = [snapshot["step"] for snapshot in found[0]["snapshots"]]
        seeds = [[relative(snapshot)[0] for snapshot in one["snapshots"]] for one in found]
        seeds_line(axes, steps, seeds, LOOKS[form], form)
    blocks = len(data["training"][f"plain, {case}"][0]["snapshots"][0]["inputs"])
    axes.axhline(1, color="black", linewidth=0.7)
    log_scale(axes)
    axes.set(title=f"{case}, depth {2 * blocks + 2}, along training", xlabel="training step")
    axes.set_ylabel("||dE/dx|| of the first block,\nover that at the end")
    axes.grid(alpha=0.25)
    axes.legend()


def panels(data: dict[str, Any]) -> list[Panel]:
    depth = max(data["start"]["plain, ReLU, BN"], key=int)
    found = [
        Panel(
            f"start-{i}",
            f"Norm of the gradient at every block's input, {title}, depth {depth}: plain, residual and sum networks",
            partial(by_block, data=data, depth=depth, case=case, title=title),
        )
        for i, (case, title) in enumerate(CASES)
    ]
    share = Panel(
        "shares",
        "Share of a block's gradient that arrives through the shortcut and through F, by block",
        partial(shares, data=data, depth=depth),
    )
    weights = [
        Panel(
            f"weights-{i}",
            f"Norm of the gradient of every convolution's weights, {title}, depth {depth}",
            partial(by_layer, data=data, depth=depth, case=case, title=title),
        )
        for i, (case, title) in enumerate((CASES[0], CASES[1], CASES[4]))
    ]
    trained = [
        Panel(
            f"training-{i}",
            f"Norm of the gradient at the first block along training, {case}",
            partial(training, data=data, case=case),
        )
        for i, case in enumerate(("ReLU, BN", "ReLU, no BN", "sigmoid, no BN"))
    ]
    return [*found, share, *weights, *trained]


def shown(data: dict[str, Any]) -> list[Panel]:
    """The two that tell most, for a page with one picture a study."""
    found = {panel.name: panel for panel in panels(data)}
    return [found["start-4"], found["start-0"], found["shares"]]
