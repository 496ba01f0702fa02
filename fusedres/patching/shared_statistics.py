"""Whether what a block's norms move is also something else of the block: then the order of its norms decides.

The original forward moves one norm's statistics before the next norm runs; a fused block moves all of them at its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fusedres.matching.plan import Plan
from fusedres.nn.residual_block import BlockCall
from fusedres.nn.running_stats import BUFFERS
from fusedres.patching import details


def shared_statistics(call: BlockCall, others: Iterable[nn.Module], plan: Plan) -> str | None:
    """A reason if what the call moves has the memory of another buffer, or of a norm's or convolution's vector.

    others: modules that a fused call calls too; those of the call itself may be among them.
    """
    for unit in call.config.units:
        if unit.training:
            break
    else:
        return None
    moved: list[Tensor] = [t for bn in call.norms for t in bn._buffers.values() if t is not None]
    for bn in call.norms:
        kept = bn._buffers
        if not ("running_mean" in kept and "running_var" in kept and "num_batches_tracked" in kept):
            for name, found in elsewhere(bn):
                if not isinstance(found, Tensor):
                    return f"unusual_number:{name}, {type(found).__name__}"
                moved.append(found)
    read: list[Tensor] = [t for unit in call.tensors for t in unit[1:4] if t is not None]  # but no weight
    if others:
        read.extend(buffers_of(call, others))
    shared = same_tensor if is_dynamo_compiling() else same_memory
    if not shared(moved, read):
        return None
    return details.shared_tensors(call, plan, buffers_of(call, others))


def elsewhere(bn: nn.Module) -> list[tuple[str, Any]]:
    """What a norm moves that is none of its registered buffers: a plain attribute, or a parameter."""
    found = ((name, getattr(bn, name, None)) for name in BUFFERS if name not in bn._buffers)
    return [(name, value) for name, value in found if value is not None]


def buffers_of(call: BlockCall, others: Iterable[nn.Module]) -> list[Tensor]:
    """Of the modules that are none of the call's norms."""
    norms = {id(bn._buffers) for bn in call.norms}  # a frozen norm is read through a view of its module
    found = (m for m in others if m is not None and id(m._buffers) not in norms)
    return [t for m in found for t in m._buffers.values() if t is not None]


def same_memory(moved: list[Tensor], read: list[Tensor]) -> bool:
    """Whether one of `moved` begins where another of them, or one of `read`, does."""
    places = set(map(Tensor.data_ptr, moved))
    return len(places) < len(moved) or not places.isdisjoint(map(Tensor.data_ptr, read))


def same_tensor(moved: list[Tensor], read: list[Tensor]) -> bool:
    """The same as far as a graph being compiled can tell: by identity, and a view may share anything."""
    views = any(t._base is not None for t in moved)
    return views or any(a is b for i, a in enumerate(moved) for b in (*moved[:i], *read))
