"""What study 4 found: how sharp, how rough and how far from convex the loss around a trained network is."""

from __future__ import annotations

from typing import Any

from fusedres.cli.study import landscape, training
from fusedres.cli.study.depth_result import Found as Trainings
from fusedres.cli.study.figures import claim, percent, said, spread
from fusedres.cli.study.networks import Kind
from fusedres.cli.study.settings import Settings

Seeds = list[dict[str, Any]]


class Found:
    """The results at one depth, by kind."""

    def __init__(self, settings: Settings, results: dict[str, Any], depth: int) -> None:
        self.settings, self.results, self.depth = settings, results, depth
        self.trainings = Trainings(settings, results)

    def seeds(self, kind: Kind) -> Seeds:
        return [
            self.results[f"landscape-{training.key(kind, self.depth, seed)}"] for seed in self.settings.seeds
        ]


def claims(found: Found) -> list[dict[str, Any]]:
    both = [found.seeds(kind) for kind in landscape.KINDS]
    pairs = list(zip(*both, strict=True))
    at, reach = f"at depth {found.depth}", f"{found.settings.reach:g}"
    losses = [said(spread(found.trainings.values(kind, found.depth, "loss"))) for kind in landscape.KINDS]

    def each(value: Any, words: Any = said) -> list[str]:
        return [words(spread(map(value, seeds))) for seeds in both]

    largest, least = each(lambda one: one["largest"]), each(lambda one: one["least"])
    curvature = each(lambda one: one["negative_curvature"], percent)
    negative, rough = each(lambda one: one["negative"], percent), each(lambda one: one["roughness"], percent)
    ended = f"(training ended at a loss of {losses[0]} residual and {losses[1]} plain)"
    return [
        claim(
            f"Shortcuts make the surface less sharp, {at}",
            [a["largest"] < b["largest"] for a, b in pairs],
            f"The Hessian's largest eigenvalue at the end of training is {largest[0]} residual and {largest[1]} plain "
            f"{ended}.",
        ),
        claim(
            f"Shortcuts make it closer to convex where training ended, {at}",
            [a["negative_curvature"] < b["negative_curvature"] for a, b in pairs],
            f"Of the sum of the Hessian's |eigenvalues| the negative ones make {curvature[0]} residual, {curvature[1]} "
            f"plain, by Lanczos quadrature; the least one found is {least[0]} and {least[1]}.",
        ),
        claim(
            f"Shortcuts make it closer to convex around that point, {at}",
            [a["negative"] < b["negative"] for a, b in pairs],
            f"Within {reach} of it along two filter-normalised directions the surface curves downwards in some "
            f"direction at {negative[0]} of the points residual, {negative[1]} plain.",
        ),
        claim(
            f"Shortcuts make it smoother, {at}",
            [a["roughness"] < b["roughness"] for a, b in pairs],
            f"The best quadratic leaves {rough[0]} of the surface's variance unexplained residual, {rough[1]} plain.",
        ),
    ]


def table(found: list[Found]) -> list[list[str]]:
    head = [
        "network",
        "depth",
        "loss",
        "largest eigenvalue",
        "negative curvature",
        "curves downwards",
        "roughness",
    ]
    rows = [head]
    for depth in found:
        for kind in landscape.KINDS:
            seeds = depth.seeds(kind)
            rows.append(
                [
                    kind.name,
                    str(depth.depth),
                    said(spread(depth.trainings.values(kind, depth.depth, "loss"))),
                    said(spread(one["largest"] for one in seeds)),
                    percent(spread(one["negative_curvature"] for one in seeds)),
                    percent(spread(one["negative"] for one in seeds)),
                    percent(spread(one["roughness"] for one in seeds)),
                ]
            )
    return rows


def summary(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    found = [Found(settings, results, depth) for depth in settings.landscape_depths]
    seeds = [one for depth in found for kind in landscape.KINDS for one in depth.seeds(kind)]
    return {
        "title": "The loss surface",
        "table_title": "Around the end of training, evaluation mode: mean [least, largest] of the seeds",
        "table": table(found),
        "claims": [one for depth in found for one in claims(depth)],
        "notes": [
            f"The surface has {settings.grid} x {settings.grid} points, from -{settings.reach:g} to "
            f"{settings.reach:g} in units of the filters' own norms, on {settings.surface_images} training images; the "
            f"Hessian is that of {settings.hessian_images}. Eigenvalues are from {settings.power_steps} steps of power "
            f"iteration, after which ||Hv - value*v|| is {said(spread(one['residual'] for one in seeds))} of the "
            "value. A network that did not train ends elsewhere: read the figures beside the loss.",
        ],
        "data": {str(d.depth): {kind.name: d.seeds(kind) for kind in landscape.KINDS} for d in found},
    }
