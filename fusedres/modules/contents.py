"""What modules hold besides parameters and submodules: flags, containers, objects.

A plan keeps what it was (`kept`, `same`); a dry run sees and undoes what a forward did to it (`Snapshot`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from enum import Enum
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SCALARS = (bool, int, float, str, type(None))
CONTAINERS = (list, tuple, set, frozenset)
UNOPENED = (  # what is no container, or is not looked into
    *SCALARS,
    *(bytes, complex, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType),
    *(Tensor, nn.Module, torch.dtype, torch.device, Enum, logging.Logger),
)
MISSING = object()
DEPTH = 3  # of an attribute that every call looks into: an object, what it holds, and what that holds
ENTRIES = 32  # of one such container
REACHED = 4096  # entries under one block that a dry run watches
COPIED = 65536  # elements of a tensor among them that it can put back


class Watched(NamedTuple):
    """A container or object as found: itself, and what it held; a sequence has no keys."""

    value: Any
    keys: tuple[Any, ...]
    values: tuple[Any, ...]


def is_plain(value: object) -> bool:
    """A value that is compared by value: a scalar, or scalars in a container."""
    if isinstance(value, SCALARS):
        return True
    if isinstance(value, dict):
        return all(isinstance(v, SCALARS) for pair in value.items() for v in pair)
    return isinstance(value, CONTAINERS) and all(isinstance(v, SCALARS) for v in value)


def opened(value: Any) -> Any:
    """A container, or the dictionary of an object's attributes; None for anything else, torch's objects included."""
    if isinstance(value, UNOPENED):
        return None
    if isinstance(value, (dict, deque, *CONTAINERS)):
        return value
    if type(value).__module__.partition(".")[0] == "torch":
        return None  # of wrappers around a module, and their tensors whose memory is away
    attributes = getattr(value, "__dict__", None)
    return attributes if isinstance(attributes, dict) else None


def values_of(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def kept(value: Any, depth: int = DEPTH) -> Any:
    """What a plan keeps of an attribute: a copy of what is plain, what an object holds, else the value itself."""
    if is_plain(value):
        return value.copy() if isinstance(value, (list, dict, set)) else value
    container = opened(value) if depth else None
    if container is None or not 0 < len(container) <= ENTRIES:
        return value
    keys = tuple(container) if isinstance(container, dict) else ()
    return Watched(value, keys, tuple(kept(v, depth - 1) for v in values_of(container)))


def same(found: Any, expected: Any) -> bool:
    if found is expected:
        return True
    if type(expected) is Watched:
        return found is expected.value and still_holds(expected)
    return type(found) is type(expected) and is_plain(found) and is_plain(expected) and found == expected


def still_holds(watched: Watched) -> bool:
    """Whether a container or object holds what it did."""
    value, keys, values = watched
    if not keys:
        return len(value) == len(values) and all(map(same, value, values))
    state = value if isinstance(value, dict) else value.__dict__
    return len(state) == len(keys) and all(
        same(state.get(key, MISSING), v) for key, v in zip(keys, values, strict=True)
    )


class Snapshot:
    """Everything that can be reached from some dictionaries without entering a module, as it is now.

    Numbers in arrays of other libraries, iterators, slots, and what lies beyond `REACHED` entries are not seen.
    closed: values that are not looked into.
    """

    def __init__(self, roots: Iterable[dict[str, Any]], closed: Iterable[object]) -> None:
        self.containers: list[tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = []
        self.tensors: list[tuple[Tensor, int, Tensor | None]] = []
        seen = {id(value) for value in closed}
        queue: list[Any] = list(roots)
        for value in queue:
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                if not value.is_inference():
                    self.tensors.append((value, value._version, copied(value)))
                continue
            container = opened(value)
            if container is not None and len(queue) < REACHED:
                values = tuple(values_of(container))
                self.containers.append((container, tuple(container), values))
                queue.extend(v for v in values if type(v) not in SCALARS)

    def restore(self) -> bool:
        """Puts everything back; returns whether anything had changed."""
        changed = False
        for container, keys, values in self.containers:
            same_keys = len(container) == len(keys) and all(map(is_, container, keys))
            if not same_keys or not all(map(is_, values_of(container), values)):
                put_back(container, keys, values)
                changed = True
        for tensor, version, copy in self.tensors:
            if tensor._version != version:
                changed = True
                if copy is not None:
                    tensor.data.copy_(copy)
        return changed


def copied(tensor: Tensor) -> Tensor | None:
    """A copy of a small tensor."""
    whole = tensor.layout is torch.strided and tensor.untyped_storage().nbytes() >= tensor.nbytes
    return tensor.detach().clone() if whole and tensor.numel() <= COPIED else None


def put_back(container: Any, keys: tuple[Any, ...], values: tuple[Any, ...]) -> None:
    """Makes a container hold that again."""
    container.clear()
    if isinstance(container, dict):
        for key, value in zip(keys, values, strict=True):
            container[key] = value
    elif isinstance(container, set):
        container.update(values)
    else:
        container.extend(values)
