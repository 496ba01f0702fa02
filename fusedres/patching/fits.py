"""Calls that were read and found fit once: whether another one of the block is the same but for its tensors' values.

Reading a call and asking every guard about it takes the host as long as a kernel or two. Guards look at constants of
the block's modules and at what its tensors are like: here the constants are compared by identity, and of the tensors
where they lie and what they are like. Only values may differ.
"""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres.blocks.config import BlockConfig, ConvBNTensors, Shortcut
from fusedres.matching.plan import Plan
from fusedres.nn.residual_block import BlockCall, compute_dtype
from fusedres.patching.guards import DEVICES, PLAIN_TENSORS

MOST = 8  # of one block: forms of its input, and modes
MOST_REMEMBERED = 64  # of one block, ever: where tensors move between calls, nothing is the same for long
PLAIN = frozenset(PLAIN_TENSORS)
CONSTANT_TYPES = {
    int,
    float,
    bool,
    str,
    type(None),
}  # an object of one of them, or a tuple of them, never changes
BUFFERS = 3  # of a BN

Units = list[Tensor | None]


Seen = tuple[list[Any], list[Any]]  # constants, and what tensors are like


class Fit(NamedTuple):
    """A call that was found fit."""

    constants: list[Any]
    tensors: list[Any]  # as `likeness` has them
    config: BlockConfig


class Fits:
    """The calls of one block that were found fit, by what their input is like."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Fit] = {}
        self._remembered = 0

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._known

    def found(self, key: tuple[Any, ...], plan: Plan, modules: dict[str, Any], x: Tensor) -> BlockCall | None:
        """The call, where it is the same as the one of this key; None: it is to be read, and guards to be asked."""
        fit, what = self._known.get(key), gathered(plan, modules)
        if fit is None or what is None:  # another thread may have forgotten it
            return None
        constants, tensors = what
        if not all(map(is_, constants, fit.constants)) or likeness(tensors) != fit.tensors:
            return None
        return as_call(fit.config, plan, modules, tensors, x)

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
        self._known[key] = Fit(constants, tensors, call.config)


def key_of(x: Tensor) -> tuple[Any, ...]:
    """All that guards look at in the input of a block, a plain tensor; () where they take none like it."""
    device = x.device
    if x.layout is not torch.strided or device.type not in DEVICES:
        return ()
    return x.shape, x.stride(), x.dtype, device, compute_dtype(x), torch.is_autocast_enabled(device.type)


def is_simple(plan: Plan) -> bool:
    """Whether what is compared here is all that guards look at."""
    frozen = any(names.frozen for names in plan.units)
    return not (plan.is_stem or plan.shortcut_paths or frozen) and plan.shortcut is not Shortcut.TENSOR


def gathered(plan: Plan, modules: dict[str, Any]) -> tuple[list[Any], Units] | None:
    """The constants of the units, and their tensors; None where they lie in unusual places.

    The tensors: of each unit weight, conv_bias, bn_weight, bn_bias, and then of each the running statistics.
    """
    constants: list[Any] = []
    read: Units = []
    moved: Units = []
    for names in plan.units:
        conv, bn = modules[names.conv], modules[names.bn]
        constants += (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
        constants += (bn.eps, bn.momentum, bn.training, bn.track_running_stats)
        of_conv, of_bn, buffers = conv._parameters, bn._parameters, bn._buffers
        if len(buffers) != BUFFERS:
            return None
        try:
            read += (of_conv["weight"], of_conv["bias"], of_bn["weight"], of_bn["bias"])
            moved += (buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"])
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


def as_call(config: BlockConfig, plan: Plan, modules: dict[str, Any], tensors: Units, x: Tensor) -> BlockCall:
    units, statistics = [], 4 * len(plan.units)
    for i, unit in enumerate(config.units):
        weight, conv_bias, bn_weight, bn_bias = tensors[4 * i : 4 * i + 4]
        mean, var, _ = tensors[statistics + 3 * i : statistics + 3 * i + 3]
        assert weight is not None
        frozen = (None, None) if unit.training else (mean, var)
        units.append(ConvBNTensors(weight, conv_bias, bn_weight, bn_bias, *frozen))
    norms: tuple[nn.BatchNorm2d, ...] = tuple([modules[names.bn] for names in plan.units])
    return BlockCall(config, tuple(units), norms, x, None)
