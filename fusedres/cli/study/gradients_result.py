"""What study 1 found: factors per block, shares of the shortcuts, and what they say about the claim."""

from __future__ import annotations

import math
from typing import Any

from scipy import stats

from fusedres.cli.study import figures, gradients
from fusedres.cli.study.figures import claim, number, percent, said, spread
from fusedres.cli.study.networks import Kind
from fusedres.cli.study.settings import Settings
from fusedres.measuring.verify import FLOAT64_LIMIT

Seeds = list[dict[str, Any]]
LEAST = 1e-300  # a norm that float64 cannot hold counts as this
VANISHED = 1e-3  # of the norm at the network's end


def decay(inputs: list[float]) -> float:
    """ln of the factor by which a gradient's norm changes with each block that it passes on its way to the input."""
    passed = range(len(inputs) - 1, -1, -1)
    return float(stats.linregress(list(passed), [math.log(max(v, LEAST)) for v in inputs]).slope)


def arrives(one: dict[str, Any], value: str = "inputs") -> float:
    """The norm at the first block's input over that at the last block's output."""
    return max(one[value][0], LEAST) / max(one["last"], LEAST)


class Found:
    """The results of every task, by kind, depth and seed."""

    def __init__(self, settings: Settings, results: dict[str, Any]) -> None:
        self.settings, self.results = settings, results
        self.deepest = max(settings.gradient_depths)

    def start(self, kind: Kind, depth: int | None = None) -> Seeds:
        depth = self.deepest if depth is None else depth
        return [self.results[gradients.name(kind, depth, seed)] for seed in self.settings.seeds]

    def training(self, kind: Kind) -> Seeds:
        depth = self.settings.gradient_depth
        return [self.results[gradients.name(kind, depth, seed, "training")] for seed in self.settings.seeds]

    def ratio(self, kind: Kind, depth: int | None = None) -> list[float]:
        return [arrives(one) for one in self.start(kind, depth)]

    def decays(self, kind: Kind, depth: int | None = None) -> list[float]:
        return [decay(one["inputs"]) for one in self.start(kind, depth)]

    def factor(self, kind: Kind) -> str:
        return said(figures.factor(self.decays(kind)))


def table(found: Found) -> list[list[str]]:
    depths = found.settings.gradient_depths
    head = ["network", *(f"arrives, depth {d}" for d in depths), f"factor a block, depth {found.deepest}"]
    rows = [
        [kind.name, *(said(spread(found.ratio(kind, d))) for d in depths), found.factor(kind)]
        for kind in gradients.KINDS
    ]
    return [head, *rows]


def split(found: Found) -> dict[str, Any]:
    """The sum rule, over every block of every network with shortcuts."""
    kinds = [kind for kind in gradients.KINDS if kind.form != "plain"]
    ones = [
        [one for kind in kinds for d in found.settings.gradient_depths for one in [found.start(kind, d)[i]]]
        for i in range(len(found.settings.seeds))
    ]
    worst = [max(max(one["split_error"]) for one in seed) for seed in ones]
    count = sum(len(one["split_error"]) for seed in ones for one in seed)
    shares = spread(sum(one["shortcut"]) / len(one["shortcut"]) for one in found.start(Kind("residual")))
    return claim(
        "The gradient of a block's input is the sum of the shortcut's part and F's part",
        [w <= FLOAT64_LIMIT for w in worst],
        f"Over {count} blocks the sum of the two parts, each computed by itself, is off the block's own gradient by "
        f"{max(worst):.1e} of its norm at most. In the residual ReLU networks with BN of depth {found.deepest} a "
        f"block's shortcut brings {percent(shares)} of it on average, and F the rest.",
    )


def claims(found: Found) -> list[dict[str, Any]]:
    deep = found.deepest
    sigmoid, relu = Kind("plain", "sigmoid", False), Kind("plain", "relu", False)
    own = Kind("plain", "relu", False, "torch")
    summed, residual = Kind("sum", "sigmoid", False), Kind("residual", "sigmoid", False)
    bn, bn_residual = Kind("plain"), Kind("residual")
    bn_sigmoid = Kind("plain", "sigmoid")
    even = list(zip(found.decays(bn), found.decays(bn_residual), strict=True))
    slower = list(zip(found.decays(own), found.decays(sigmoid), strict=True))
    alone = spread(arrives(one, "alone") for one in found.start(bn_residual))
    return [
        split(found),
        claim(
            "In a plain network with sigmoid the gradient vanishes",
            [ratio < VANISHED for ratio in found.ratio(sigmoid)],
            f"Without BN, at depth {deep}, {said(spread(found.ratio(sigmoid)))} of its norm arrives at the first "
            f"block; each block multiplies it by {found.factor(sigmoid)}.",
        ),
        claim(
            "With ReLU it vanishes too in a very deep plain network, but more slowly",
            [0 > a > b for a, b in slower],
            f"Without BN and with the start that torch's layers have by default a block multiplies it by "
            f"{found.factor(own)}. With He's start, made for ReLU, the factor is {found.factor(relu)}, and "
            f"{said(spread(found.ratio(relu)))} arrives at depth {deep}: there the start alone "
            f"{'prevents most of it' if min(found.ratio(relu)) > VANISHED else 'does not prevent it'}.",
        ),
        claim(
            "Where y = F(x) + x the gradient passes undiminished, even with sigmoid",
            [ratio >= 1 for ratio in found.ratio(summed)],
            f"Without BN, at depth {deep}, {said(spread(found.ratio(summed)))} times its norm arrives, and a block "
            f"multiplies it by {found.factor(summed)}.",
        ),
        claim(
            "Where the sigmoid comes after the addition, y = sigmoid(F(x) + x), it passes too",
            [ratio >= VANISHED for ratio in found.ratio(residual)],
            f"Without BN, at depth {deep}, {said(spread(found.ratio(residual)))} arrives, a factor of "
            f"{found.factor(residual)} a block: the sum's derivative is multiplied by that of the sigmoid, at most "
            "1/4, on every way.",
        ),
        claim(
            "Shortcuts keep the norm more even than a plain network of the kind that is used: BN and ReLU",
            [abs(a) > abs(b) for a, b in even],
            f"At depth {deep} a block multiplies it by {found.factor(bn)} plain and by {found.factor(bn_residual)} "
            f"residual. What goes through all shortcuts and through no F arrives with {said(alone)} times its norm: "
            "less than all of it, for the ReLU after each addition and the BN of the projections take their part.",
        ),
        claim(
            "BN alone keeps the gradient of a plain network with ReLU from vanishing",
            [ratio >= VANISHED for ratio in found.ratio(bn)],
            f"At depth {deep} {said(spread(found.ratio(bn)))} times the norm arrives with BN, "
            f"{said(spread(found.ratio(relu)))} without. Where more than 1 arrives it grows towards the input "
            f"instead; with shortcuts as well it is {said(spread(found.ratio(bn_residual)))}.",
        ),
        claim(
            "BN alone keeps the gradient of a plain network with sigmoid from vanishing",
            [ratio >= VANISHED for ratio in found.ratio(bn_sigmoid)],
            f"At depth {deep} {said(spread(found.ratio(bn_sigmoid)))} arrives with BN, a factor of "
            f"{found.factor(bn_sigmoid)} a block, and {said(spread(found.ratio(sigmoid)))} without, a factor of "
            f"{found.factor(sigmoid)}; at depth {min(found.settings.gradient_depths)} "
            f"{said(spread(found.ratio(bn_sigmoid, min(found.settings.gradient_depths))))} arrives with BN.",
        ),
    ]


def along(found: Found) -> list[str]:
    """What training changes, in one sentence a kind."""
    lines = []
    for kind in gradients.TRAINED:
        seeds = found.training(kind)
        first, last = (spread(arrives(one["snapshots"][i]) for one in seeds) for i in (0, -1))
        steps = seeds[0]["snapshots"][-1]["step"]
        loss = spread(one["losses"][-1] for one in seeds)
        lines.append(
            f"{kind.name}, depth {found.settings.gradient_depth}: {number(first['mean'])} arrives before training, "
            f"{said(last)} after {steps} steps, when the loss is {said(loss)}."
        )
    return lines


def summary(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    found = Found(settings, results)
    return {
        "title": "Vanishing gradients",
        "table_title": "Norm of dE/dx at the first block over dE/dy at the last one, at initialisation: "
        "mean [least, largest] of the seeds; factor with its 95 % interval",
        "table": table(found),
        "claims": claims(found),
        "notes": along(found),
        "data": {
            "start": {
                k.name: {str(d): found.start(k, d) for d in settings.gradient_depths} for k in gradients.KINDS
            },
            "training": {k.name: found.training(k) for k in gradients.TRAINED},
        },
    }
