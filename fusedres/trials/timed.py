"""The time of one call: of its forward, and of its backward, where one comes.

Both are seen from outside, the same for a recipe and for the original forward: from the moment at which the gradient
of y arrives to the one at which the first operation of the forward has run backward, which is the last to do so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedres.trials.clocks import Clock

LEAVES = 2**63  # AccumulateGrad nodes are numbered from the other end
Stamps = list[tuple[Any, Any]]  # beginning and end of forward, then of backward


def is_in_backward() -> bool:
    """Whether this thread runs a backward: what is called there is a checkpoint's second forward."""
    return torch._C._current_graph_task_id() != -1


def now_in_graph() -> int:
    """The number of the next node that this thread puts into an autograd graph."""
    return torch._C._autograd._get_sequence_nr()


def first_node(last: Any, since: int) -> Any:
    """The node that was made first, of those behind `last` that were made from number `since` on."""
    first, number = last, last._sequence_nr()
    stack, seen = [last], {last}
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None or node in seen or not since <= node._sequence_nr() < LEAVES:
                continue
            seen.add(node)
            stack.append(node)
            if node._sequence_nr() < number:
                first, number = node, node._sequence_nr()
    return first


def timed(
    compute: Callable[[], Any],
    clock: Clock,
    with_backward: bool,
    tell: Callable[[Stamps], None],
    begins: Callable[[], object] = lambda: None,
) -> Any:
    """What `compute` gives. `tell` is given the stamps once all of them are taken, in whatever thread that is.

    Args:
        compute: the forward; its result is a tensor, or else no backward is timed.
        with_backward: whether the time counts only together with that of a backward.
        begins: called as the backward begins.
    """
    since = now_in_graph()
    begin = clock.stamp()
    y = compute()
    stamps: Stamps = [(begin, clock.stamp())]
    if not with_backward:
        tell(stamps)
    elif isinstance(y, Tensor) and y.grad_fn is not None:
        time_backward(y.grad_fn, since, clock, stamps, tell, begins)
    return y


def time_backward(
    last: Any,
    since: int,
    clock: Clock,
    stamps: Stamps,
    tell: Callable[[Stamps], None],
    begins: Callable[[], object],
) -> None:
    """last: the node of y. The first backward counts, and no other: one that ends before the first node is lost."""
    begun: list[tuple[int, Any]] = []

    def begin(gradients: Any) -> None:
        if not begun:
            begins()
            begun.append((torch._C._current_graph_task_id(), clock.stamp()))

    def end(inputs: Any, outputs: Any) -> None:
        if begun and len(stamps) == 1 and begun[0][0] == torch._C._current_graph_task_id():
            stamps.append((begun[0][1], clock.stamp()))
            tell(stamps)

    last.register_prehook(begin)
    first_node(last, since).register_hook(end)
