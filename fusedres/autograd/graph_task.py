"""What the backward that is running is asked for.

`ctx.needs_input_grad` says what required a gradient in forward. `torch.autograd.grad(y, x)` takes the one of x alone,
and torch's own operations then compute no other: they ask the engine, as is done here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def receivers(ctx: Any) -> Sequence[tuple[Any, int]] | None:
    """The nodes that the gradients go to, one for each tensor that the Function was applied to; None where the engine
    does not run ctx: a graph traces it, or somebody calls it by itself."""
    if torch.compiler.is_dynamo_compiling():
        return None
    try:
        return ctx.next_functions if torch._C._will_engine_execute_node(ctx) else None
    except RuntimeError:  # outside of a backward torch refuses to answer
        return None


def will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except (
        RuntimeError
    ):  # torch refuses to answer for a leaf only if `torch.autograd.grad` returns its gradient
        return True


def taken(ctx: Any, wanted: Sequence[bool], places: Iterable[tuple[int, int]]) -> Sequence[bool]:
    """`wanted` without the gradients that the running backward would drop.

    Args:
        ctx: of the Function whose backward runs.
        wanted: a flag for each argument of the Function.
        places: of the gradients that are asked about: where each stands among `receivers`, and in `wanted`.
    """
    nodes = receivers(ctx)
    if nodes is None:
        return wanted
    result = list(wanted)
    for node, place in places:
        if result[place]:
            result[place] = will_run(nodes[node][0])
    return result
