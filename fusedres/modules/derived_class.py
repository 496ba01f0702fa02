"""A subclass that passes for the class it was made from.

    module.__class__, isinstance, ==, hash, tables keyed by class, type(module)(...), class Other(type(module))

all mean the base. Making the subclass runs no code of the user's: neither `__init_subclass__` nor a metaclass is
called. `type(module) is Base` is the one question whose answer changes.
"""

from __future__ import annotations

import abc
import copyreg
import inspect
from functools import cache
from typing import Any

from torch import nn

STATE = "_fusedres"  # the attribute of a patched module that holds its plan and options
BASE = "__fusedres_base__"  # the attribute of a derived class that holds the class it was made from
_class = object.__dict__["__class__"]  # the slots themselves: a patched class has properties in front of them
_bases, _mro = (type.__dict__[name] for name in ("__bases__", "__mro__"))


def set_class(module: nn.Module, cls: type) -> None:
    """`module.__class__ = cls`, past the property of a patched class."""
    _class.__set__(module, cls)


def as_base(cls: Any) -> Any:
    """The class that a patched class stands for; any other object as it is."""
    return type.__getattribute__(cls, BASE) if is_patched_class(cls) else cls


def is_patched_class(cls: Any) -> bool:
    return issubclass(type(cls), PatchedType)


def base_class(module: nn.Module) -> Any:
    """The class that a module had before it was given a derived one."""
    return getattr(type(module), BASE, type(module))


class PatchedType(abc.ABCMeta):
    """The metaclass of patched classes: to whoever asks the class, it is its base.

    It is an ABCMeta so that a class statement may name a patched class beside an abstract one.
    """

    def __new__(meta, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **keywords: Any) -> Any:
        """A class statement that names a patched class among its bases inherits from its base instead."""
        bases = tuple(as_base(base) for base in bases)
        return type(bases[0])(name, bases, namespace, **keywords)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return as_base(cls)(*args, **kwargs)

    def __eq__(cls, other: object) -> bool:
        return as_base(cls) is as_base(other)

    def __hash__(cls) -> int:
        return hash(as_base(cls))

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, as_base(cls))

    def __subclasscheck__(cls, subclass: Any) -> bool:
        return issubclass(subclass, as_base(cls))

    def __setattr__(cls, name: str, value: Any) -> None:
        setattr(as_base(cls), name, value)

    def __delattr__(cls, name: str) -> None:
        delattr(as_base(cls), name)

    def mro(cls) -> list[type]:
        """Python asks for it while it makes the class: past a metaclass of the user's."""
        (base,) = _bases.__get__(cls)
        return [cls, *_mro.__get__(base)]

    @property  # not `__mro__` too: Dynamo looks attributes up in it
    def __bases__(cls) -> tuple[type, ...]:  # type: ignore[override]
        return as_base(cls).__bases__

    @property
    def __base__(cls) -> type:
        return as_base(cls).__base__

    @property
    def __signature__(cls) -> inspect.Signature:
        return inspect.signature(as_base(cls))


def base_itself(base: type) -> type:
    """What a pickled patched class is loaded as."""
    return base


def reduce_class(cls: type) -> Any:
    return base_itself, (as_base(cls),)


copyreg.pickle(PatchedType, reduce_class)


@cache
def metaclass_for(base_metaclass: type) -> type:
    """PatchedType on top of the base's metaclass, whose own hooks for subclasses are not run."""
    if base_metaclass is type:
        return PatchedType
    made: Any = type.__new__(type, base_metaclass.__name__, (PatchedType,), {})
    made.__bases__ = (PatchedType, base_metaclass)
    copyreg.pickle(made, reduce_class)
    return made


def derive(base: type, namespace: dict[str, Any]) -> Any:
    """A subclass of `base` with its name, made past `__init_subclass__` and the metaclass.

    Raises:
        TypeError: the layout of its instances does not allow it, or the class answers for `__class__` itself.
    """
    if inspect.getattr_static(base, "__class__") is not _class:
        raise TypeError(f"{base.__qualname__} answers for its __class__ itself")
    known = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    made: Any = type.__new__(metaclass_for(type(base)), base.__name__, (nn.Module,), known | namespace)
    _bases.__set__(made, (base,))  # `__init_subclass__` is called for the bases at creation alone
    return made
