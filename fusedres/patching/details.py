"""What a reason code of a call says after its colon: the part of the block, what was found, and what was needed.

These functions run once a call is refused. A graph being compiled notes no reason, so that there a code comes without
a detail, and Dynamo traces none of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fusedres.blocks.config import ConvBNConfig, Window
from fusedres.matching.plan import ConvBNNames, Plan
from fusedres.nn.attributes import tensor
from fusedres.nn.residual_block import BlockCall, ConvBN
from fusedres.nn.running_stats import BUFFERS

SHORT = "torch."


def detailed(code: str, *parts: object) -> str:
    """The code with its detail."""
    if is_dynamo_compiling():
        return code
    return f"{code}:{', '.join(str(part).removeprefix(SHORT) for part in parts if part is not None)}"


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """How a method was called that takes one tensor: the types of what is positional, and the names of the rest."""
    if is_dynamo_compiling():
        return "signature"
    parts = [*(type(a).__name__ for a in args), *(f"{name}=" for name in kwargs)]
    return detailed("signature", *(parts or ["no argument"]))


def kind(t: Tensor) -> object:
    """What keeps a tensor from being a plain one: its class, or its layout."""
    return type(t).__name__ if t.layout is torch.strided else t.layout


def shape(t: Tensor) -> list[int]:
    return list(t.shape)


def of_input(code: str, x: Tensor, needed: torch.dtype | None = None) -> str:
    """A code for the input. needed: the dtype that a block computes in, if that is not the input's."""
    if is_dynamo_compiling():
        return code
    found: dict[str, Any] = {
        "tensor_subclass": kind,
        "device": lambda t: t.device,
        "dtype": lambda t: t.dtype,
        "layout_nchw": lambda t: f"strides {t.stride()}",
    }
    other = needed is not None and needed is not x.dtype
    return detailed(code, "input", found.get(code, shape)(x), f"needed {name_of(needed)}" if other else None)


def name_of(dtype: object) -> str:
    return str(dtype).removeprefix(SHORT)


def vectors(names: ConvBNNames, bn: nn.BatchNorm2d) -> list[tuple[str, Any]]:
    """Every vector of a norm, with its path, and its counter."""
    return [(f"{names.bn}.{name}", getattr_or_none(bn, name)) for name in ("weight", "bias", *BUFFERS)]


def getattr_or_none(module: nn.Module, name: str) -> Any:
    try:
        return tensor(module, name)
    except AttributeError:  # a frozen norm counts no batches
        return None


def tensors_of(call: BlockCall, plan: Plan) -> list[tuple[str, Any]]:
    """Every tensor that the call read or moves, with its path."""
    return [
        named
        for names, t, bn in zip(plan.units, call.tensors, call.norms, strict=True)
        for named in (
            (f"{names.conv}.weight", t.weight),
            (f"{names.conv}.bias", t.conv_bias),
            *vectors(names, bn),
        )
    ]


def of_tensor(code: str, t: Tensor, call: BlockCall, plan: Plan, needed: object = None) -> str:
    """A code for one tensor of the block, with its path."""
    if is_dynamo_compiling():
        return code
    found: dict[str, Any] = {
        "tensor_subclass": kind,
        "device": lambda t: t.device,
        "dtype": lambda t: t.dtype,
        "parameter_shape": shape,
        "layout_mixed": lambda _: "channels_last",
        "trainable_statistics": lambda _: None,
    }
    path = next((path for path, other in tensors_of(call, plan) if other is t), "a tensor")
    return detailed(code, path, found[code](t), None if needed is None else f"needed {name_of(needed)}")


def kind_of(found: object) -> str:
    return "None" if found is None else type(found).__name__


def of_module(code: str, conv: nn.Module, units: Sequence[ConvBN], plan: Plan, leaf: str) -> str:
    """A code for a unit that cannot be read. leaf: of its convolution, or of its norm, the attribute that is not so."""
    if is_dynamo_compiling():
        return code
    names, unit = next((n, u) for n, u in zip(plan.units, units, strict=True) if u.conv is conv)
    if leaf == "weight":
        found = tensor(unit.conv, leaf)
        plain = isinstance(found, Tensor) and code == "parameter_shape"
        return detailed(code, f"{names.conv}.{leaf}", shape(found) if plain else kind_of(found))
    if leaf == "padding_mode":
        return detailed(code, f"{names.conv}.{leaf}")
    leaf, other = (leaf, "var") if tensor(unit.bn, "running_mean") is None else ("running_var", "mean")
    return detailed(code, f"{names.bn}.{leaf}", f"None beside a running_{other}")


def shared_norm(units: Sequence[ConvBN], plan: Plan) -> str:
    """The code for a norm that stands in two units, with its paths."""
    if is_dynamo_compiling():
        return "shared_module"
    seen: dict[int, str] = {}
    for names, unit in zip(plan.units, units, strict=True):
        first = seen.setdefault(id(unit.bn), names.bn)
        if first != names.bn:
            return detailed("shared_module", first, names.bn)
    return "shared_module"


def geometry(unit: ConvBNConfig, path: str) -> str:
    """The code for numbers that no convolution takes."""
    if is_dynamo_compiling():
        return "geometry_changed"
    low = {"stride": 1, "padding": 0, "dilation": 1}
    found = [(n, getattr(unit, n)) for n, least in low.items() if min(getattr(unit, n)) < least]
    name, value = found[0] if found else ("groups", unit.groups)
    return f"geometry_changed:{path}.{name}, {value}"


def sizes(path: str, found: Sequence[int], needed: Sequence[int] | None = None) -> str:
    """The code for a unit's output whose height and width do not fit."""
    if is_dynamo_compiling():
        return "geometry_changed"
    gives = f"gives {found[0]}x{found[1]}"
    return detailed("geometry_changed", path, gives, needed and f"the shortcut {needed[0]}x{needed[1]}")


def counts(code: str, path: str, found: int, needed: int) -> str:
    """A code for numbers of channels. path: of the weight or input that has them."""
    if is_dynamo_compiling():
        return code
    return f"{code}:{path}, {found} channels, needed {needed}"


def pooling(pool: nn.MaxPool2d | Window, plan: Plan) -> str:
    """The code for a stem's pooling, with its path and numbers."""
    if is_dynamo_compiling():
        return "geometry_changed"
    if isinstance(pool, Window):
        pool = nn.MaxPool2d(*pool)
    return detailed(
        "geometry_changed", plan.pool if isinstance(plan.pool, str) else "pooling", pool.extra_repr()
    )


def shared_tensors(call: BlockCall, plan: Plan, others: Iterable[Tensor]) -> str:
    """The code for a statistic that has the memory of another tensor, with both paths."""
    if is_dynamo_compiling():
        return "shared_statistics"
    moved = [f"{names.bn}.{name}" for names in plan.units for name in BUFFERS]
    seen: dict[int, str] = {}
    shortcut = [("a buffer of the shortcut", t) for t in others]
    named = [(path, t) for path, t in (*tensors_of(call, plan), *shortcut) if isinstance(t, Tensor)]
    for path, t in sorted(named, key=lambda found: found[0] not in moved):
        first = seen.setdefault(t.data_ptr(), path)
        if first != path and first in moved:
            return detailed("shared_statistics", first, path)
    return "shared_statistics"
