"""Whether a block's modules are still as a call found them, but for their tensors; read by the native library.

`resolve` says by name what has changed, and the tensors are then read in Python: this is the same in a tenth of the
time, for calls of which nothing has. csrc/front/watch.cpp goes by the tuple that is made here.
"""

from __future__ import annotations

import struct
from typing import Any

from torch import nn

from fusedres.matching.plan import Plan
from fusedres.modules.contents import is_plain
from fusedres.modules.derived_class import base_class
from fusedres.modules.tree import Submodule
from fusedres.nn.running_stats import BUFFERS
from fusedres.patching.guards import PLAIN_TENSORS
from fusedres.patching.patched_class import ORIGINAL

MOST_SHARED = 4096
MOST_MODULES = 32  # of a block: as csrc/front/watch.cpp has room for
NUMBERS_OF_CONV = "stride", "padding", "dilation", "groups", "padding_mode"
NUMBERS_OF_BN = "eps", "momentum", "training", "track_running_stats"
NUMBERS_OF_POOL = "kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"
WEIGHT_AND_BIAS = "weight", "bias"
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
ANY, EMPTY, PARAMETERS, BUFFERS_OF_BN, MODULES = SIGNS = tuple(
    object() for _ in range(5)
)  # of an attribute's value

Objects = tuple[tuple[Any, ...], bytes]  # some objects, and their addresses
_shared: dict[bytes, Objects] = {}  # by the addresses


def shared(values: tuple[Any, ...]) -> Objects:
    """The same for the same names and numbers: blocks are alike, and a processor's caches are small."""
    made = values, struct.pack(f"{len(values)}P", *map(id, values))
    if not all(is_plain(value) or value in SIGNS for value in values):
        return made  # whose objects nothing else is to keep
    if len(_shared) >= MOST_SHARED:
        _shared.clear()
    return _shared.setdefault(made[1], made)


def expected_of(
    found: Submodule, module: nn.Module, numbers: tuple[str, ...], is_norm: bool
) -> tuple[Any, ...]:
    """Of each attribute of the module its value or a sign. numbers: the names of those that a call reads."""
    signs = {
        **dict(found.attributes),
        "_parameters": PARAMETERS if numbers else ANY,
        "_buffers": BUFFERS_OF_BN if is_norm else ANY,
        "_modules": MODULES,
        **dict.fromkeys(HOOKS if found.path else ("_backward_hooks",), EMPTY),
    }
    return tuple(signs.get(name, value if name in numbers else ANY) for name, value in vars(module).items())


def watch_of(block: nn.Module, plan: Plan, modules: dict[str, Any]) -> tuple[Any, ...] | None:
    """What the reader goes by; None where a part of the block is no module, or has a forward of its own.

    It holds no module and no tensor. Of values it holds those that the plan has, and numbers.

    Args:
        modules: by path, as `resolve` found them in this call.
    """
    found = [*modules.values()]
    # of a model's stem: in which attribute of the model its parts are, and their names
    roots = (
        () if plan.whole else ("_modules", *(part.path for part in plan.structure if "." not in part.path))
    )
    if not len(found) == len(plan.structure) <= MOST_MODULES:
        return None
    if any("forward" in vars(module) for path, module in modules.items() if path):
        return None
    places = {path: place for place, path in enumerate(modules)}
    convs, bns = [names.conv for names in plan.units], [names.bn for names in plan.units]
    units = [path for names in plan.units for path in (names.conv, names.bn)]
    numbers = {**dict.fromkeys(convs, NUMBERS_OF_CONV), **dict.fromkeys(bns, NUMBERS_OF_BN)}
    if isinstance(plan.pool, str):
        numbers[plan.pool] = NUMBERS_OF_POOL
    replaced = base_class(block), plan.method, getattr(type(block), ORIGINAL)
    described = tuple(
        (
            type(m),
            shared((*vars(m),)),
            shared(expected_of(s, m, numbers.get(s.path, ()), s.path in bns)),
            (*m._modules,),
        )
        for s, m in zip(plan.structure, found, strict=True)
    )
    flags = tuple((places[s.path], *flag) for s in plan.structure for flag in s.flags)
    read = [
        (places[path], kind, name, getattr(modules[path], name, None) is None)
        for paths, kind, names in ((units, 0, WEIGHT_AND_BIAS), (bns, 1, BUFFERS))
        for path in paths
        for name in names
    ]
    norms = tuple(places[path] for path in bns)
    return SIGNS, (*plan.methods.known, replaced), described, flags, norms, tuple(read), PLAIN_TENSORS, roots
