"""Counts products as tools without module hooks do: by a dispatch mode and the formulas of torch's registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Flops(TorchDispatchMode):
    """`total` of everything dispatched inside, and the names of its `operators`."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.operators = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operators.add(str(func._overloadpacket))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops_of(call: Callable[..., Any], *args: Any) -> int:
    with Flops() as counted:
        call(*args)
    return counted.total
