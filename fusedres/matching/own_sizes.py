"""The sizes at which a module's own code may take another path: those around every number that it could reach.

Numbers are looked for where code finds them: constants, defaults, closures, globals, attributes of modules and of
their classes, and what containers and objects among these hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from math import isqrt
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from fusedres.modules import own_code

Shape = tuple[int, int, int]  # of an input: N, H, W
DEPTH = 4  # of containers and objects in each other
ENTRIES = 32  # of one container
MOST_NUMBERS = 64  # around which runs are made
MOST_PAIRED = 6  # of which each two are a height and a width
LARGEST_SIZE = 1 << 20  # of one side
LARGEST_AREA = 1 << 40
SIDES = (1, 2, 3, 4, 5, 7, 8, 14, 16, 31, 56, 63, 64, 100, 128, 225, 256, 513, 1024)
BATCHES = (1, 3, 4, 5, 8, 17, 64, 257)


def probes(modules: Iterable[nn.Module], channels: int) -> Iterator[Shape]:
    """Sizes around every number that the code of these modules could hold a size against."""
    numbers = sorted(numbers_named(list(modules)))
    sides = [n for n in numbers if n <= LARGEST_SIZE]
    near = sorted({n + d for n in sides for d in (-1, 0, 1)})
    for side in dict.fromkeys((*SIDES, *near, *roots(numbers, channels))):
        yield 2, side, side
    for side in dict.fromkeys((1, 2, 3, 33, *near)):
        yield 2, side, 32
        yield 2, 32, side
    for side in near:
        yield 1, side, 1
        yield 1, 1, side
    for height, width in itertools.permutations(sides[:MOST_PAIRED], 2):
        yield 2, height, width
    for batch in dict.fromkeys((*BATCHES, *near)):
        yield batch, 32, 32


def roots(numbers: Iterable[int], channels: int) -> Iterator[int]:
    """Sides of squares whose area, or number of elements, is about such a number."""
    for n in numbers:
        if n > max(SIDES):
            yield from (isqrt(n) + 1, isqrt(n // (2 * channels)) + 1)


def numbers_named(modules: list[nn.Module]) -> set[int]:
    """The numbers that the forwards of these modules may hold a size or an area against, at most MOST_NUMBERS."""
    own = [m for m in modules if not own_code.is_torch(type(m))]
    functions = own_code.functions_of(own_code.user_classes(own), held(own))
    names = {name for f in functions for name in own_code.mentions(f)}
    classes = {cls for m in own for cls in type(m).__mro__ if not own_code.is_torch(cls)}
    found = itertools.chain(
        (c for f in functions for code in own_code.codes(f) for c in numbers_in(code.co_consts, names)),
        (n for m in own for n in numbers_in(list(vars(m).values()), names, DEPTH, len(vars(m)))),
        (n for cls in classes for n in numbers_in(cls, names)),
        (n for f in functions for value in own_code.outer_values(f) for n in numbers_in(value, names)),
    )
    whole = (int(n) for n in found if 1 < n <= LARGEST_AREA)
    return set(itertools.islice(dict.fromkeys(whole), MOST_NUMBERS))


def held(modules: Iterable[nn.Module]) -> list[Any]:
    """The objects among the attributes of these modules."""
    return [v for m in modules for v in vars(m).values() if not isinstance(v, own_code.NO_OBJECTS)]


def numbers_in(
    value: Any, names: set[str], depth: int = DEPTH, entries: int = ENTRIES
) -> Iterator[int | float]:
    """The numbers in a value: of containers all entries, of objects, classes and Python modules the named ones."""
    if type(value) in (int, float):
        yield value
        return
    if not depth or isinstance(value, (str, bytes, Tensor, nn.Module)):
        return
    if isinstance(value, dict):
        inner: Iterable[Any] = value.values()
    elif isinstance(value, (tuple, list, set, frozenset)):
        inner = value
    elif isinstance(value, FunctionType) or own_code.is_torch(
        value if isinstance(value, (type, ModuleType)) else type(value)
    ):
        return
    else:
        attributes = getattr(value, "__dict__", {})
        inner = [attributes[name] for name in names if name in attributes]
    for v in itertools.islice(inner, entries):
        yield from numbers_in(v, names, depth - 1)
