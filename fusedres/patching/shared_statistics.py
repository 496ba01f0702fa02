"""Whether what a block's norms move is also something else of the block: then the order of its norms decides.

The original forward moves one norm's statistics before the next norm runs; a fused block moves all of them at its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fusedres.nn.attributes import tensor
from fusedres.nn.residual_block import BlockCall
from fusedres.nn.running_stats import BUFFERS
from fusedres.patching.norms import FrozenNorm


def shared_statistics(call: BlockCall, others: Iterable[nn.Module]) -> str | None:
    """A reason if a buffer that the call moves has the memory of another buffer, or of a norm's weight or bias.

    others: modules that a fused call calls too; those of the call itself may be among them.
    """
    if not any(unit.training for unit in call.config.units):
        return None
    moved: list[Any] = [
        tensor(bn, name) for bn in call.norms if type(bn) is not FrozenNorm for name in BUFFERS
    ]
    read: list[Any] = [t for unit in call.tensors for t in (unit.bn_weight, unit.bn_bias)]
    norms = {id(bn) for bn in call.norms}
    for module in others:
        if module is not None and id(module) not in norms:
            read.extend(module._buffers.values())
    shared = same_tensor if is_dynamo_compiling() else same_memory
    found = shared([t for t in moved if t is not None], [t for t in read if t is not None])
    return "shared_statistics" if found else None


def same_memory(moved: list[Tensor], read: list[Tensor]) -> bool:
    """Whether one of `moved` begins where another of them, or one of `read`, does."""
    places = {t.data_ptr() for t in moved}
    return len(places) < len(moved) or any(t.data_ptr() in places for t in read)


def same_tensor(moved: list[Tensor], read: list[Tensor]) -> bool:
    """The same as far as a graph being compiled can tell: by identity, and a view may share anything."""
    views = any(t._base is not None for t in moved)
    return views or any(a is b for i, a in enumerate(moved) for b in (*moved[:i], *read))
