"""The class that a patched module is given: a derived class in which one method is ours.

Copy and pickle go through `Behaviour`; another tool's class that is assigned to the module goes under the patched one.
A dry run under the patched class finds forwards that ask `type(self) is Block`.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import cache, wraps
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from fusedres.modules.derived_class import BASE, STATE, derive, is_patched_class, set_class
from fusedres.modules.derived_class import base_itself as base_itself  # pickles name it here

ORIGINAL = "__fusedres_original__"  # the attribute of a patched class that holds the method it replaced


class Behaviour(NamedTuple):
    """What a patched class does: `call(module, base, method, args, kwargs)` runs the method; `rebuild(base, method)`
    makes an empty module for copy and pickle, and `complete(module, method)` is given it once its state is in it."""

    call: Callable[[nn.Module, type, str, tuple[Any, ...], dict[str, Any]], Any]
    rebuild: Callable[[type, str], nn.Module]
    complete: Callable[[nn.Module, str], None]


def patched_class(base: type, method: str, behaviour: Behaviour) -> Any:
    """The subclass that a module of class `base` is given.

    Raises:
        TypeError: the class allows no such subclass.
    """
    return subclass(base, method, behaviour, getattr(base, method))


@cache
def subclass(base: type, method: str, behaviour: Behaviour, original: Any) -> Any:
    """The patched class of `base` while its method is `original`."""
    call = behaviour.call

    def template(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(self, base, method, args, kwargs)

    # torch.jit.script compiles the source of the original, which `wraps` points to, with the names that are global
    # here: they must be the original's. The code is a copy, for Dynamo keeps what it compiled with the code object,
    # up to a limit for each.
    code, closure = template.__code__.replace(co_name=method), template.__closure__
    replacement = wraps(original)(FunctionType(code, original.__globals__, method, None, closure))

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        made = super(patched, self).__reduce_ex__(max(protocol, 2))
        if made[0] is copyreg.__newobj__ and made[1][0] is patched:  # type: ignore[attr-defined]
            return (behaviour.rebuild, (base, method), *made[2:])
        return made

    def set_state(self: nn.Module, state: Any) -> None:
        super(patched, self).__setstate__(state)
        behaviour.complete(self, method)

    def assign(self: nn.Module, cls: type) -> None:
        """Another tool's class goes under the patched one while it keeps the method; else it replaces both."""
        if STATE in vars(self) and not is_patched_class(cls) and getattr(cls, method, None) is original:
            cls = patched_class(cls, method, behaviour)
        set_class(self, cls)
        if not is_patched_class(cls):
            vars(self).pop(STATE, None)

    def own_class(self: nn.Module) -> type:
        # Dynamo looks up methods in what `__class__` says, though a module's call in its type
        return base if method == "forward" else type(self)

    patched = derive(
        base,
        {
            "__reduce_ex__": reduce_ex,
            "__setstate__": set_state,
            "__class__": property(own_class, assign),
            method: replacement,
            BASE: base,
            ORIGINAL: original,
        },
    )
    return patched
