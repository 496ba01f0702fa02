"""Figures over seeds: their mean, their spread, and the interval of a mean; how a claim is said."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scipy import stats

CONFIDENCE = 0.95


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean, least and largest of the seeds."""
    found = list(values)
    return {"mean": statistics.fmean(found), "low": min(found), "high": max(found)}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95 % interval by Student's t; of one value the interval is infinite."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = (
        stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    )
    return mean, mean - half, mean + half


def factor(logs: Sequence[float]) -> dict[str, float]:
    """exp of a mean of logarithms, and of the ends of its interval."""
    mean, low, high = interval(logs)
    return {"mean": math.exp(mean), "low": math.exp(max(low, -700)), "high": math.exp(min(high, 700))}


def rounded(value: Any, digits: int = 5) -> Any:
    """The same plain data with that many significant digits, and None for what is no finite number."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def number(value: float) -> str:
    """Three significant digits, as a person writes them."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.1e}"


def said(found: dict[str, float], unit: str = "") -> str:
    """mean [least, largest]; where one seed diverged there is no mean."""
    if not math.isfinite(found["mean"]):
        return "not finite"
    low, high = (number(found[end]) for end in ("low", "high"))
    return f"{number(found['mean'])}{unit} [{low}, {high}]"


def percent(found: dict[str, float]) -> str:
    return "{:.1%} [{:.1%}, {:.1%}]".format(*(found[k] for k in ("mean", "low", "high")))


def claim(name: str, holds: Sequence[bool], sentence: str) -> dict[str, Any]:
    """A claim, in how many seeds it shows, and the sentence with its figures, which holds in either case."""
    count = sum(holds)
    verdict = "shows" if count == len(holds) else "does not show"
    return {
        "claim": name,
        "shows": count == len(holds),
        "seeds": f"{count} of {len(holds)}",
        "sentence": f"{name}: {verdict} here ({count} of {len(holds)} seeds). {sentence}",
    }


def over_seeds(found: list[dict[str, Any]], value: str) -> dict[str, float]:
    return spread(one[value] for one in found)
