"""What the Python code of a user's modules says of itself, read from code objects: names, constants, calls of `super`.

Torch's own classes and functions are taken as known. A dry run sees what a forward does; this sees what it could ask.
"""

from __future__ import annotations

import dis
import inspect
import itertools
from collections.abc import Iterable, Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

ORDERS = frozenset({"mro", "__mro__"})
MOST_FUNCTIONS = 256  # that one forward is followed into
ATTRIBUTE_READS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD")
NO_OBJECTS = (bool, int, float, complex, str, bytes, type(None), tuple, list, dict, set, frozenset)


def is_torch(owner: Any) -> bool:
    """Whether a class, function or Python module belongs to torch."""
    name = owner.__name__ if isinstance(owner, ModuleType) else getattr(owner, "__module__", None)
    return (name or "").partition(".")[0] == "torch"


def codes(function: FunctionType) -> Iterator[CodeType]:
    """The code of a function and of all that is defined inside."""
    queue = [function.__code__]
    for code in queue:
        yield code
        queue.extend(c for c in code.co_consts if isinstance(c, CodeType))


def plain_function(value: Any) -> FunctionType | None:
    """The Python function behind a method, property, class method, decorator with `__wrapped__`, or None."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    return value if isinstance(value, FunctionType) else None


def named(cls: type, name: str) -> Any:
    """What a class has by that name, as it stands in the class; None where it has nothing."""
    return inspect.getattr_static(cls, name, None)


def mentions(function: FunctionType) -> set[str]:
    """Every name that the code looks up, and every string in it."""
    found: set[str] = set()
    for code in codes(function):
        found.update(code.co_names, code.co_freevars, (c for c in code.co_consts if isinstance(c, str)))
    return found


def attributes_named(function: FunctionType) -> set[str]:
    """The names that the code reads from objects."""
    return {
        instruction.argval
        for code in codes(function)
        for instruction in dis.get_instructions(code)
        if instruction.opname in ATTRIBUTE_READS
    }


def attributes_read(function: FunctionType) -> set[str]:
    """The names that the code may read from objects: in a user's function every string too, for `getattr`."""
    named = attributes_named(function)
    return named if is_torch(function) else named | mentions(function)


@cache
def called_names(cls: Any, start: str = "forward") -> tuple[str, ...]:
    """The methods of a class that its `start` can come to by name, itself first; of torch's classes too."""
    found = [start]
    for name in found:
        function = plain_function(named(cls, name))
        if function is None:
            continue
        for other in sorted(attributes_read(function)):
            if other not in found and plain_function(named(cls, other)) is not None:
                found.append(other)
    return tuple(found)


def functions_of(classes: Iterable[type], held: Iterable[Any] = ()) -> list[FunctionType]:
    """The user's functions that the forwards of these classes can come to: methods, and functions and methods of
    objects by a global name, in a closure, as a default argument or among `held`, what their modules hold."""
    seen: dict[int, FunctionType] = {}
    queue: list[Any] = []
    held = list(held)
    for cls in classes:
        for base in cls.__mro__:
            if not is_torch(base):
                queue.extend(vars(base).get(name) for name in called_names(cls))
    for value in queue:
        function = plain_function(value)
        if function is None or id(function) in seen or is_torch(function) or len(seen) >= MOST_FUNCTIONS:
            continue
        seen[id(function)] = function
        queue.append(getattr(function, "__wrapped__", None))
        names = {name for code in codes(function) for name in code.co_names}
        for other in (*outer_values(function), *held):
            queue.extend(callees(other, names))
    return list(seen.values())


def outer_values(function: FunctionType) -> list[Any]:
    """What a function finds outside of its arguments: globals by name, its closure, its defaults."""
    found = [function.__globals__.get(name) for code in codes(function) for name in code.co_names]
    found += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return found + cells(function)


def cells(function: FunctionType) -> list[Any]:
    """What a function's closure holds."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # an empty cell
            continue
    return found


def callees(value: Any, names: set[str]) -> list[Any]:
    """What code that uses these names may call of a value: itself, functions of a module, methods of an object."""
    if plain_function(value) is not None:
        return [value]
    if isinstance(value, ModuleType):
        return [] if is_torch(value) else [vars(value).get(name) for name in names]
    if isinstance(value, (*NO_OBJECTS, nn.Module)):
        return []
    cls = value if isinstance(value, type) else type(value)
    return [] if is_torch(cls) else [named(cls, name) for name in (*names, "__call__")]


def user_classes(modules: Iterable[nn.Module]) -> list[type]:
    """The classes of these modules that are not torch's."""
    return [cls for cls in dict.fromkeys(type(m) for m in modules) if not is_torch(cls)]


@cache
def looked_up(cls: Any) -> frozenset[str]:
    """Every name that the forward of a user's class may look up on its module, `getattr` with a string included."""
    return frozenset(name for function in functions_of((cls,)) for name in mentions(function))


def methods(cls: Any, without: tuple[str, ...] = ()) -> list[FunctionType]:
    """The user's methods of a class, with what their decorators wrap."""
    queue = [
        v for base in cls.__mro__ if not is_torch(base) for n, v in vars(base).items() if n not in without
    ]
    found: dict[int, FunctionType] = {}
    for value in queue:
        function = plain_function(value)
        if function is None or is_torch(function) or id(function) in found:
            continue
        found[id(function)] = function
        queue.append(getattr(function, "__wrapped__", None))
        queue.extend(v for v in cells(function) if isinstance(v, FunctionType))
    return list(found.values())


@cache
def reads_own_class(cls: Any) -> bool:
    """Whether a method of the class reads a `__class__`, or may skip its own class as `skips_own_class` has it."""
    reads = any("__class__" in attributes_named(function) for function in methods(cls))
    return reads or skips_own_class(cls)


@cache
def skips_own_class(cls: Any) -> bool:
    """Whether a method of the class may say `super(type(self), self)`: under a subclass that means another class.

    `type(self) is C`, `type(self).__mro__` and `.mro()` count too. `super(self.__class__, self)` does not: a patched
    module says that its class is its base. Nor does `__init__`: `type(module)(...)` makes modules of the base.
    """
    return any(
        "type" in code.co_names
        and (not ORDERS.isdisjoint(code.co_names) or ("super" in code.co_names and gives_super_a_type(code)))
        for function in methods(cls, without=("__init__",))
        for code in codes(function)
    ) or cls in types_asked_for(cls)


@cache
def types_asked_for(cls: Any) -> frozenset[type]:
    """The classes that the methods of a user's class hold a module's type against with `is`."""
    functions = methods(cls, without=("__init__",))
    return frozenset(found for function in functions for found in compared_types(function))


def gives_super_a_type(code: CodeType) -> bool:
    """Whether some `super` is given `type(...)` or a local variable, rather than nothing or a class by its name."""
    return any(
        first.argval == "super" and (second.argval == "type" or second.opname.startswith("LOAD_FAST"))
        for first, second in itertools.pairwise(loads(code))
        if first.opname in ("LOAD_GLOBAL", "LOAD_DEREF", *ATTRIBUTE_READS)
    )


def loads(code: CodeType) -> list[dis.Instruction]:
    """The instructions without those that do nothing for the meaning."""
    return [
        i for i in dis.get_instructions(code) if i.opname not in ("PUSH_NULL", "CACHE", "PRECALL", "RESUME")
    ]


def compared_types(function: FunctionType) -> list[Any]:
    """The classes C that a function names in `type(...) is C` or `type(...) is not C`."""
    found = []
    for code in codes(function):
        instructions = loads(code) if "type" in code.co_names else []
        for i, instruction in enumerate(instructions):
            if instruction.opname != "IS_OP":
                continue
            before = instructions[max(i - 8, 0) : i]
            if any(b.argval == "type" and b.opname == "LOAD_GLOBAL" for b in before):
                found += [value_named(function, b) for b in before if b.argval != "type"]
    return [value for value in found if isinstance(value, type)]


def value_named(function: FunctionType, instruction: dis.Instruction) -> Any:
    """What an instruction loads by a global name, from a closure, or as an attribute of a global module."""
    name = instruction.argval
    if instruction.opname == "LOAD_GLOBAL":
        return function.__globals__.get(name)
    if instruction.opname == "LOAD_DEREF":
        return next((v for v in cells(function) if isinstance(v, type) and v.__name__ == name), None)
    if instruction.opname in ATTRIBUTE_READS:
        modules = (v for v in outer_values(function) if isinstance(v, ModuleType))
        return next((vars(m)[name] for m in modules if name in vars(m)), None)
    return None
