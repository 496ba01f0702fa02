"""Two calls of the package's own ops, one after the other, that a replay makes as one (csrc/front/bn_merged.cpp).

A block calls an op that sums over rows and then one that forms channel vectors from its sums, which on a GPU is a
launch of its own; the merged op's last block forms them. The results are bitwise equal.
"""

from __future__ import annotations

from typing import NamedTuple

from fusedres.recording.code import NONE, Kind, Result

Argument = tuple[Kind, bool, object]  # its kind, whether its declared type is optional, its slot or value
Return = tuple[int, Result]

STATS, SCALE_SHIFT = "fusedres_native::bn_stats", "fusedres_native::bn_scale_shift"
REDUCE, COEFFICIENTS = (
    "fusedres_native::bn_add_relu_backward_reduce",
    "fusedres_native::bn_backward_coefficients",
)
STATS_SCALE_SHIFT = "fusedres_native::bn_stats_scale_shift"
REDUCE_COEFFICIENTS = "fusedres_native::bn_add_relu_backward_reduce_coefficients"
ABSENT: Argument = Kind.NONE, True, 0
REDUCED = 9  # arguments of `REDUCE`
NOT_FORMED = [(NONE, Result.OPTIONAL_TENSOR)] * 3  # dweight, B, K of a shortcut


class Call(NamedTuple):
    """An operator, its arguments, and the slots of its results."""

    name: str
    arguments: list[Argument]
    returns: list[Return]

    def value(self, index: int) -> object:
        """The slot or number of an argument; NONE where there is none."""
        kind, _, value = self.arguments[index]
        return NONE if kind is Kind.NONE else value

    def made(self, index: int) -> int:
        return self.returns[index][0]


def merged(first: Call, second: Call) -> Call | None:
    """One call for two that follow each other; None: they stay two."""
    if (first.name, second.name) == (STATS, SCALE_SHIFT):
        return stats_scale_shift(first, second)
    if (first.name, second.name) == (REDUCE, COEFFICIENTS):
        return reduce_coefficients(first, second)
    if (first.name, second.name) == (REDUCE_COEFFICIENTS, COEFFICIENTS):
        return with_shortcut(first, second)
    return None


def stats_scale_shift(stats: Call, vectors: Call) -> Call | None:
    """vectors: of (mean, var, weight, bias, eps)."""
    if (vectors.value(0), vectors.value(1)) != (stats.made(0), stats.made(1)):
        return None
    return Call(STATS_SCALE_SHIFT, stats.arguments + vectors.arguments[2:], stats.returns + vectors.returns)


def reduce_coefficients(reduce: Call, coefficients: Call) -> Call | None:
    """reduce: of (dy, c, mean, scale, shift, mask, relu, shortcut_c, shortcut_mean); coefficients: of (sum_dz,
    sum_dz_centered, mean, invstd, scale, rows, training)."""
    needed = reduce.made(0), reduce.made(1), reduce.value(2), reduce.value(3)
    if tuple(coefficients.value(i) for i in (0, 1, 2, 4)) != needed:
        return None
    _, _, _, invstd, _, rows, training = coefficients.arguments
    no_shortcut = [ABSENT, ABSENT, (Kind.BOOL, False, 0)]
    arguments = [*reduce.arguments, invstd, rows, training, *no_shortcut]
    return Call(REDUCE_COEFFICIENTS, arguments, reduce.returns + coefficients.returns + NOT_FORMED)


def with_shortcut(reduced: Call, coefficients: Call) -> Call | None:
    """reduced: from `reduce_coefficients`; coefficients: of the projection's BN, over as many rows."""
    needed = reduced.made(0), reduced.made(2), reduced.value(REDUCED - 1), reduced.value(REDUCED + 1)
    if tuple(coefficients.value(i) for i in (0, 1, 2, 5)) != needed or reduced.value(REDUCED + 3) != NONE:
        return None
    _, _, _, (_, _, invstd), (_, _, scale), _, training = coefficients.arguments
    shortcut = [(Kind.TENSOR, True, invstd), (Kind.TENSOR, True, scale), training]
    (dweight, _), *others = coefficients.returns
    returns = [*reduced.returns[:-3], (dweight, Result.OPTIONAL_TENSOR), *others]
    return Call(REDUCE_COEFFICIENTS, [*reduced.arguments[:-3], *shortcut], returns)
