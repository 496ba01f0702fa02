"""What study 2 found: whether plain networks get worse with depth, and what shortcuts change about it."""

from __future__ import annotations

from typing import Any

from fusedres.cli.study import depth, networks
from fusedres.cli.study.figures import claim, percent, said, spread
from fusedres.cli.study.networks import Kind
from fusedres.cli.study.settings import Settings

Seeds = list[dict[str, Any]]
LAST = 10  # steps whose mean is the loss at the end


class Found:
    """The results of every training, by kind and depth."""

    def __init__(self, settings: Settings, results: dict[str, Any]) -> None:
        self.settings, self.results = settings, results

    def seeds(self, kind: Kind, at: int) -> Seeds:
        return [self.results[depth.name(kind, at, seed)] for seed in self.settings.seeds]

    def values(self, kind: Kind, at: int, what: str = "training_error") -> list[float]:
        if what == "loss":
            return [sum(one["losses"][-LAST:]) / len(one["losses"][-LAST:]) for one in self.seeds(kind, at)]
        return [one[what] for one in self.seeds(kind, at)]

    def best(self, kind: Kind) -> int:
        """The depth of the least mean training error; of several, the shallowest."""
        return min(self.settings.depths, key=lambda at: sum(self.values(kind, at)))


def table(found: Found) -> list[list[str]]:
    rows = [["network", "depth", "training error", "test error", "training loss at the end"]]
    for kind in depth.KINDS:
        for at in found.settings.depths:
            cells = (
                percent(spread(found.values(kind, at, what))) for what in ("training_error", "test_error")
            )
            rows.append([kind.name, str(at), *cells, said(spread(found.values(kind, at, "loss")))])
    return rows


def claims(found: Found) -> list[dict[str, Any]]:
    plain, residual, bare = networks.PLAIN, networks.RESIDUAL, Kind("plain", norm=False)
    deep, shallow = max(found.settings.depths), found.best(plain)

    def pairs(a: list[float], b: list[float]) -> list[bool]:
        return [x > y for x, y in zip(a, b, strict=True)]

    def error(kind: Kind, at: int, what: str = "training_error") -> str:
        return percent(spread(found.values(kind, at, what)))

    chance = 1 - 1 / found.results["classes"]
    stuck = [at for at in found.settings.depths if min(found.values(bare, at)) > 0.9 * chance]
    return [
        claim(
            "Past some depth a plain network is worse, in training error too",
            pairs(found.values(plain, deep), found.values(plain, shallow)),
            f"With BN, in {found.settings.steps} steps, the plain network's training error is "
            f"{error(plain, shallow)} at depth {shallow}, its best, and {error(plain, deep)} at depth {deep}; "
            f"its test error {error(plain, shallow, 'test_error')} and {error(plain, deep, 'test_error')}.",
        ),
        claim(
            "With shortcuts a network of that depth trains",
            pairs(found.values(plain, deep), found.values(residual, deep)),
            f"At depth {deep} the residual network's training error is {error(residual, deep)}, the plain one's "
            f"{error(plain, deep)}; at depth {min(found.settings.depths)} they are "
            f"{error(residual, min(found.settings.depths))} and {error(plain, min(found.settings.depths))}.",
        ),
        claim(
            "The residual network itself does not get worse with depth",
            [
                not worse
                for worse in pairs(found.values(residual, deep), found.values(residual, found.best(residual)))
            ],
            f"Its training error is {error(residual, found.best(residual))} at depth {found.best(residual)}, its best, "
            f"and {error(residual, deep)} at depth {deep}, after as many steps.",
        ),
        claim(
            "BN alone lets plain networks train that do not train without it",
            pairs(found.values(bare, shallow), found.values(plain, shallow)),
            f"At depth {shallow} the plain network's training error is {error(bare, shallow)} without BN and "
            f"{error(plain, shallow)} with it; without BN it is at chance, or within a tenth of that, at depths "
            f"{', '.join(map(str, stuck)) or 'none'}. With BN what is left of the degradation is the first claim's.",
        ),
    ]


def summary(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    found = Found(settings, results)
    said_of_plain = claims(found)
    enough = (
        "the effect shows on them"
        if said_of_plain[0]["shows"]
        else "harder ones may be needed to see the effect"
    )
    return {
        "title": "Degradation with depth",
        "table_title": "Errors after training, evaluation mode: mean [least, largest] of the seeds",
        "table": table(found),
        "claims": said_of_plain,
        "notes": [
            f"Every network trains for {settings.steps} steps of {settings.batch} images, by SGD with the same "
            f"one-cycle learning rate of at most {settings.learning_rate}, whatever its kind and depth. The images are "
            f"as they come, without noise or augmentation: {enough}."
        ],
        "data": {k.name: {str(d): found.seeds(k, d) for d in settings.depths} for k in depth.KINDS},
    }
