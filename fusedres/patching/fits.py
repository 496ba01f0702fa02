"""Calls that were read and found fit once: whether another one of the block is the same but for its tensors' values.

Reading a call and asking every guard about it takes the host as long as a kernel or two. Guards look at constants of
the block's modules and at what its tensors are like: here the constants are compared by identity, and of the tensors
where they lie and what they are like. Only values may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres.blocks.config import BlockConfig, ConvBNTensors, Shortcut
from fusedres.matching.plan import Plan
from fusedres.nn.residual_block import BlockCall
from fusedres.nn.running_stats import BUFFERS
from fusedres.ops.native import places
from fusedres.ops.native.from_python import watch_reader
from fusedres.patching.guards import DEVICES, PLAIN_TENSORS, is_refused_by_graphs, taken_by_stem
from fusedres.patching.resolve import has_global_hooks, resolve
from fusedres.patching.watch import (
    NUMBERS_OF_BN,
    NUMBERS_OF_CONV,
    NUMBERS_OF_POOL,
    WEIGHT_AND_BIAS,
    watch_of,
)

MOST = 8  # of one block: forms of its input, and modes
MOST_REMEMBERED = 64  # of one block, ever: where tensors move between calls, nothing is the same for long
PLAIN = frozenset(PLAIN_TENSORS)
PLAIN_OR_NONE = PLAIN | {type(None)}
CONSTANT_TYPES = {
    int,
    float,
    bool,
    str,
    type(None),
}  # an object of one of them, or a tuple of them, never changes
# out of a convolution's and a BN's own attributes, their parameters and a BN's buffers
numbers_of_conv, numbers_of_bn = itemgetter(*NUMBERS_OF_CONV), itemgetter(*NUMBERS_OF_BN)
weight_and_bias = itemgetter(*WEIGHT_AND_BIAS)
statistics = itemgetter(*BUFFERS)
numbers_of_pool = itemgetter(*NUMBERS_OF_POOL)
NONE = None, None
new_tuple: Callable[..., Any] = tuple.__new__  # of a NamedTuple, as its own `__new__` takes twice as long

Units = list[Tensor | None]


Seen = tuple[list[Any], list[Any]]  # constants, and what tensors are like


class Fit(NamedTuple):
    """A call that was found fit."""

    constants: list[Any]
    tensors: list[Any]  # as `likeness` has them
    places: places.Places | None  # the same, where the native library can compare
    config: BlockConfig
    is_stem: bool
    watch: tuple[Any, ...] | None  # of the block's modules, where the native library can read them

    def holds(self, tensors: Units) -> bool:
        """Whether these lie where the call's did, and are like them."""
        if self.places is None or torch._C._len_torch_dispatch_stack():  # a mode would see the operator
            return likeness(tensors) == self.tensors
        return PLAIN_OR_NONE.issuperset(map(type, tensors)) and self.places.hold(tensors)

    def unchanged(self, block: nn.Module, x: Tensor) -> BlockCall | None:
        """The block's call now, where all is the same; None: nobody knows, and modules are to be resolved."""
        read = watch_reader()
        if read is None or self.watch is None or has_global_hooks():
            return None
        found = read(self.watch, block)
        if found is None:
            return None
        units = len(self.config.units)
        tensors = found[units:]
        if not self.holds(tensors):
            return None
        x = taken_by_stem(x, tensors[0]) if self.is_stem else x
        return as_call(self.config, tuple(found[:units]), tensors, x)

    def call(self, plan: Plan, modules: dict[str, Any], x: Tensor) -> BlockCall | None:
        """The same of modules that were resolved; None: it is to be read, and guards to be asked."""
        what = gathered(plan, modules)
        if what is None:
            return None
        constants, tensors = what
        if not all(map(is_, constants, self.constants)) or not self.holds(tensors):
            return None
        x = taken_by_stem(x, modules[plan.units[0].conv].weight) if self.is_stem else x
        return as_call(self.config, tuple([modules[names.bn] for names in plan.units]), tensors, x)


class Fits:
    """The calls of one block that were found fit, by what their input is like."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Fit] = {}
        self._remembered = 0

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._known

    def of(self, key: tuple[Any, ...]) -> Fit | None:
        return self._known.get(key)

    def before(self, key: tuple[Any, ...], plan: Plan, modules: dict[str, Any]) -> Seen | None:
        """What a call is remembered by, to be asked for before it is read; None: it is not to be remembered."""
        if not key or self._remembered >= MOST_REMEMBERED or not is_simple(plan):
            return None
        what = gathered(plan, modules)
        return None if what is None else (what[0], likeness(what[1]))

    def remember(
        self, key: tuple[Any, ...], plan: Plan, modules: dict[str, Any], seen: Seen, call: BlockCall
    ) -> None:
        """Notes a call that was found fit.

        seen: of before it was read. Where another thread has changed the block since, nobody knows what was read.
        """
        what = gathered(plan, modules)
        constants, tensors = seen
        if what is None or not all(map(is_, constants, what[0])) or likeness(what[1]) != tensors:
            return
        flat = chain.from_iterable(c if type(c) is tuple else (c,) for c in constants)
        if not {*map(type, flat)} <= CONSTANT_TYPES:
            return
        if len(self._known) >= MOST:
            self._known.clear()
        self._remembered += 1
        self._known[key] = Fit(constants, tensors, places.of(what[1]), call.config, plan.is_stem, None)

    def watch(
        self, key: tuple[Any, ...], block: nn.Module, plan: Plan, harmless: dict[str, tuple[str, int]]
    ) -> None:
        """Has the native library watch the modules of a call that is known, and was resolved just now."""
        if watch_reader() is None or self._remembered >= MOST_REMEMBERED:
            return
        self._remembered += 1
        modules, known = resolve(block, plan, harmless, False), self._known.get(key)
        if isinstance(modules, str) or known is None or (watch := watch_of(block, plan, modules)) is None:
            return
        # what another thread did meanwhile is in the watch, and not in what was found fit
        if resolve(block, plan, harmless, False) != modules or (what := gathered(plan, modules)) is None:
            return
        if all(map(is_, what[0], known.constants)):
            self._known[key] = known._replace(watch=watch)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on this kind of device, where it is on."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def key_of(x: Tensor, training: bool) -> tuple[Any, ...]:
    """All that guards look at in the input of a block, a plain tensor; () where they take none like it.

    training: the block's mode, so that what is known of one does not give way to the other in every epoch.
    """
    device = x.device
    kind = device.type
    if x.layout is not torch.strided or kind not in DEVICES:
        return ()
    is_refused = is_refused_by_graphs(x)
    return x.shape, x.stride(), x.dtype, device, x.requires_grad, is_refused, autocast_dtype(kind), training


def is_simple(plan: Plan) -> bool:
    """Whether what is compared here is all that guards look at."""
    frozen = any(names.frozen for names in plan.units)
    return not (plan.shortcut_paths or frozen) and plan.shortcut is not Shortcut.TENSOR


def gathered(plan: Plan, modules: dict[str, Any]) -> tuple[list[Any], Units] | None:
    """The constants of the units, and their tensors; None where they lie in unusual places.

    The tensors: of each unit weight, conv_bias, bn_weight, bn_bias, and then of each the running statistics.
    """
    constants: list[Any] = []
    read: Units = []
    moved: Units = []
    try:
        for names in plan.units:
            conv, bn = modules[names.conv].__dict__, modules[names.bn].__dict__
            constants += numbers_of_conv(conv)
            constants += numbers_of_bn(bn)
            read += weight_and_bias(conv["_parameters"])
            read += weight_and_bias(bn["_parameters"])
            buffers = bn["_buffers"]
            if len(buffers) != len(BUFFERS):
                return None
            moved += statistics(buffers)
        if isinstance(plan.pool, str):
            constants += numbers_of_pool(modules[plan.pool].__dict__)
    except KeyError:
        return None
    read += moved
    return constants, read


def likeness(tensors: Units) -> list[Any]:
    """Where the tensors lie, and what they are like; where one is not plain or strided, what nothing equals."""
    given = [t for t in tensors if t is not None]
    if not PLAIN.issuperset(map(type, given)) or any(t.layout is not torch.strided for t in given):
        return [object()]
    found: list[Any] = [t is None for t in tensors]
    found += map(Tensor.data_ptr, given)
    found += map(Tensor.stride, given)
    for t in given:
        found += (t.shape, t.dtype, t.device)
    return found


def as_call(config: BlockConfig, norms: tuple[Any, ...], tensors: Units, x: Tensor) -> BlockCall:
    """tensors: as `gathered` has them."""
    units, running, moved = [], [], 4 * len(norms)
    for i, unit in enumerate(config.units):
        buffers = tensors[moved + 3 * i : moved + 3 * i + 3]
        frozen = NONE if unit.training else buffers[1:]
        units.append(new_tuple(ConvBNTensors, (*tensors[4 * i : 4 * i + 4], *frozen)))
        running.append(buffers)
    return new_tuple(BlockCall, (config, tuple(units), norms, x, None, running))
