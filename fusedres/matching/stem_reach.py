"""Whether a class's forward still comes to the method with the stem, by the names that its code uses.

Libraries of encoders subclass a ResNet and write a forward that calls the stem's modules itself: the method is there,
but nothing calls it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from fusedres.matching.stem_source import nested


def codes(function: Any) -> Iterator[CodeType]:
    """The code of a function, of what it wraps or closes over, and of what is defined inside."""
    seen: set[int] = set()
    queue: list[Any] = [function]
    for f in queue:
        f = inspect.unwrap(f) if callable(f) else f
        if id(f) in seen or type(f) is not FunctionType:
            continue
        seen.add(id(f))
        yield f.__code__
        yield from nested(f.__code__)
        queue.extend(cell_contents(f))


def cell_contents(function: FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # the cell is empty
            continue
    return found


def names_used(function: Any) -> set[str]:
    """Attributes and globals that a function names, and its texts, which getattr may be given."""
    found: set[str] = set()
    for code in codes(function):
        found.update(code.co_names)
        found.update(text for text in code.co_consts if isinstance(text, str))
    return found


def definitions(base: type, name: str) -> tuple[Any, ...]:
    """What classes call by that name, the nearest first."""
    return tuple(vars(cls)[name] for cls in base.__mro__ if name in vars(cls))


def reaches(base: type, method: str) -> bool:
    """Whether the forward of `base` names the method, or names one of its own methods that does.

    A function that uses its own name goes on to the next definition, as with super(). One without Python code may
    call anything.
    """
    queue, seen = [("forward", 0)], set()
    for name, index in queue:
        found = definitions(base, name)[index:]
        if (name, index) in seen or not found:
            continue
        seen.add((name, index))
        if name == "forward" and not any(True for _ in codes(found[0])):
            return True
        used = names_used(found[0])
        if method in used:
            return True
        queue.extend((other, index + 1 if other == name else 0) for other in used)
    return False
