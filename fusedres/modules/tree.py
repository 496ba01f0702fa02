"""The tree of modules under a block, as it is found at patching: what a call later holds it against."""

from __future__ import annotations

from collections.abc import Iterable
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from fusedres.modules import own_code
from fusedres.modules.contents import is_plain, kept
from fusedres.modules.derived_class import STATE, base_class

BOOKKEEPING = frozenset(
    {STATE, "forward", *vars(nn.Module())}
)  # looked at apart, or in torch's care on every module
READ_ANEW = {  # what a call reads from the modules themselves, or what changes no result
    nn.Conv2d: frozenset(vars(nn.Conv2d(1, 1, 1))),
    nn.BatchNorm2d: frozenset(vars(nn.BatchNorm2d(1))),
    nn.MaxPool2d: frozenset(vars(nn.MaxPool2d(1))),
    nn.ReLU: frozenset({"inplace"}),
}
FROZEN_TENSORS = ("weight", "bias", "running_mean", "running_var")  # of a norm with constants


class Submodule(NamedTuple):
    """One module of a block as found.

    path, cls; children: their names in order; attributes: the module's own; flags: the plain attributes of its class
    that none of its own hides; newest: the name of the attribute that it was given last; called: the methods of its
    class that its forward can come to; absent: names that its code may look up, but neither it nor its class has.
    """

    path: str
    cls: type
    children: tuple[str, ...]
    attributes: tuple[tuple[str, object], ...]
    flags: tuple[tuple[str, object], ...]
    newest: str
    called: tuple[str, ...]
    absent: tuple[str, ...] = ()


class Methods:
    """Methods of some classes as they are now: name and function of each."""

    def __init__(self, names: Iterable[tuple[Any, str]]) -> None:
        found = ((cls, name, getattr(cls, name, None)) for cls, name in dict.fromkeys(names))
        self.known = tuple(entry for entry in found if isinstance(entry[2], FunctionType))

    def __copy__(self) -> Methods:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Methods:
        return self


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether it holds a BN's four vectors without being one of torch's; what it does with them, the dataflow says."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) or module._modules:
        return False
    tensors = [module._parameters.get(name, module._buffers.get(name)) for name in FROZEN_TENSORS]
    return all(isinstance(t, Tensor) and t.is_floating_point() and t.dim() == 1 for t in tensors) and (
        len({t.shape for t in tensors}) == 1  # type: ignore[union-attr]
    )


def attributes(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """The module's own flags, numbers and functions: its forward may depend on them."""
    ignored = BOOKKEEPING.union(*(keys for cls, keys in READ_ANEW.items() if isinstance(module, cls)))
    if is_frozen_norm(module):
        ignored |= {"eps"}
    return tuple((k, kept(v)) for k, v in vars(module).items() if k not in ignored)


def flags(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """The plain attributes of its own classes that the module reads: those of torch's decide nothing."""
    cls, own = base_class(module), vars(module)
    found: dict[str, object] = {}
    for base in cls.__mro__:
        if not own_code.is_torch(base):
            for name, value in vars(base).items():
                if is_plain(value) and not name.startswith("__") and name not in own:
                    found.setdefault(name, kept(value))
    return tuple(found.items())


def methods(structure: tuple[Submodule, ...]) -> Methods:
    """What the calls of a block's submodules run, and its own methods but the one that is replaced."""
    return Methods(
        (found.cls, name)
        for found in structure
        for name in (*(("__call__",) if found.path else ()), *found.called)
        if found.cls is not type(None) and (found.path or name != found.called[0])
    )


def describe_module(path: str, module: nn.Module, method: str = "forward") -> Submodule:
    cls: Any = base_class(module)
    called = own_code.called_names(cls, method)
    newest = next(name for name in reversed(vars(module)) if name != STATE)
    children, missing = tuple(module._modules), () if own_code.is_torch(cls) else absent(module, cls)
    return Submodule(path, cls, children, attributes(module), flags(module), newest, called, missing)


def absent(module: nn.Module, cls: type) -> tuple[str, ...]:
    """The names that the code of a user's class may look up on the module and that do not exist."""
    known = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    names = (name for name in own_code.looked_up(cls) - known if name.isidentifier() and name[:2] != "__")
    return tuple(sorted(name for name in names if own_code.named(cls, name) is None))


def describe(block: nn.Module) -> tuple[Submodule, ...]:
    """The block and everything below it, breadth first, names that hold None included."""
    found: list[Submodule] = []
    queue: list[tuple[str, Any]] = [("", block)]
    for path, module in queue:
        if module is None:
            found.append(Submodule(path, type(None), (), (), (), "", ()))
            continue
        found.append(describe_module(path, module))
        children = module._modules.items()
        queue.extend((f"{path}.{name}" if path else name, child) for name, child in children)
    # what `patch` gives the block is given last
    return found[0]._replace(newest=STATE), *found[1:]
