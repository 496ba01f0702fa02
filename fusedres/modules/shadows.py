"""Attributes of an instance that hide what its class has: a method given to one module alone, `module.compile()`.

Python looks into the instance first, so the module's own forward and its call use them; a recipe, which knows the
class, would not.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from fusedres.modules import own_code
from fusedres.modules.contents import is_plain
from fusedres.modules.derived_class import BASE, STATE, base_class
from fusedres.modules.tree import Submodule

MISSING = object()
CALL_PATH = ("_call_impl", "_compiled_call_impl")  # of every module: between `module(x)` and its forward


def is_own_forward(module: nn.Module) -> bool:
    """Whether a forward that was set on the instance is that of its class, as tools leave it that had wrapped it."""
    forward = vars(module)["forward"]
    if getattr(forward, "__self__", None) is not module:
        return False
    cls = type(module)
    functions = {getattr(c, "forward", None) for c in (cls, getattr(cls, BASE, cls))}
    return forward.__func__ in functions or getattr(forward.__func__, "__wrapped__", MISSING) in functions


def has_own_forward(module: nn.Module) -> bool:
    """Whether the module has an attribute of its own that holds the forward of its class."""
    return "forward" in vars(module) and is_own_forward(module)


def hidden(cls: type, module: nn.Module, name: str) -> Any:
    """What an instance attribute of that name hides: of the class, or of the module's own parameters, buffers and
    submodules, which Python looks for last; or MISSING."""
    for own in (module._parameters, module._buffers, module._modules):
        if name in own:
            return own[name]
    return inspect.getattr_static(cls, name, MISSING)


def shadowing(module: nn.Module) -> str | None:
    """The name of an attribute of the module that hides a method, descriptor or object of its class, or None.

    A plain value that hides a plain one, as `expansion = 4` of many blocks, is an attribute like others.
    """
    cls = base_class(module)
    for name, value in vars(module).items():
        if name in ("forward", STATE) or (name == "_compiled_call_impl" and value is None):
            continue
        of_class = hidden(cls, module, name)
        if of_class is not MISSING and not (is_plain(of_class) and is_plain(value)):
            return name
    return None


def new_attribute(
    module: nn.Module, found: Submodule, harmless: dict[str, tuple[str, int]], compiling: bool
) -> str | None:
    """A reason if the module was given an attribute, since it was found, that its forward or its call may look up."""
    state = module.__dict__
    if compiling:
        return new_in_graph(module, found)
    latest = next(reversed(state))
    if harmless.get(found.path) == (latest, len(state)):
        return None
    for name in reversed(state):
        if name == found.newest:
            break
        if name in ("forward", STATE) or (name == "_compiled_call_impl" and state[name] is None):
            continue
        path = f"{found.path}.{name}" if found.path else name
        if hidden(found.cls, module, name) is not MISSING:
            return f"instance_shadows:{path}"
        if not own_code.is_torch(found.cls) and name in own_code.looked_up(found.cls):
            return f"attribute_changed:{path}"
    harmless[found.path] = latest, len(state)
    return None


def new_in_graph(module: nn.Module, found: Submodule) -> str | None:
    """The same for a graph being compiled. Dynamo watches for what is read, not for what is asked of a dictionary."""
    state, prefix = module.__dict__, f"{found.path}." if found.path else ""
    for name in (*CALL_PATH, *found.called):
        getattr(module, name, None)
        if name in state and name != "forward" and state[name] is not None:
            return f"instance_shadows:{prefix}{name}"
    for own in (module._parameters, module._buffers, module._modules):
        for name in own:
            if name in state:
                return f"instance_shadows:{prefix}{name}"
    for name in found.absent:
        getattr(module, name, None)
        if name in state:
            return f"attribute_changed:{prefix}{name}"
    return None
