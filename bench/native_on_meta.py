"""The native backend of a GPU on meta tensors: every launch is noted, with the bytes of its operands, and none is made.

Each op is one kernel; where a reduction ends in its last block, the counters that tell which block that is are cleared
by a memset before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from fusedres.ops import fake
from fusedres.ops.backend import Backend, Function
from fusedres.ops.contract import (
    BnAddReluBackwardReduce,
    BnReluMaxpoolBackwardReduce,
    BnStats,
    Conv1x1Forward,
    Conv3x3BackwardInput,
    Conv3x3Forward,
    ConvBackwardInput,
    ConvBackwardWeight,
    RawOp,
    op_name,
)
from fusedres.ops.native import functions, library, products

Note = Callable[[str, int], None]  # of a kernel's name and the bytes that it moves
ON_CPUS_ALONE = {ConvBackwardInput, ConvBackwardWeight}
REDUCING = {BnStats, BnAddReluBackwardReduce, BnReluMaxpoolBackwardReduce}
SEVERAL_LAUNCHES = {
    kind for kind in products.PRODUCTS if "gram" in op_name(kind)
}  # those are Triton's to count here
SEVERAL_LAUNCHES |= {kind for kind in products.PRODUCTS if op_name(kind) == "conv1x1_backward_weight"}


def clears_counters(op: RawOp) -> bool:
    return type(op) in REDUCING or (isinstance(op, (Conv1x1Forward, Conv3x3Forward)) and op.save_stats)


def read_by(op: RawOp) -> list[Tensor]:
    """What the kernel reads: an op's x that is there for its form alone is not among it."""
    values = op._replace(x=None) if isinstance(op, Conv3x3BackwardInput) else op
    distinct = {id(t): t for t in tree_leaves(tuple(values)) if isinstance(t, Tensor)}
    return list(distinct.values())


def backend(note: Note) -> Backend:
    """note: is told of every launch."""

    def function(kind: type) -> Function:
        def run(op: RawOp) -> Any:
            with _disable_current_modes():
                result = fake.FUNCTIONS[kind](op)
            read = read_by(op)
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and all(t is not r for r in read)]
            if clears_counters(op):
                note("memset", 0)
            note(op_name(kind), sum(t.numel() * t.element_size() for t in (*read, *made)))
            return result

        return run

    kinds = set(functions.FUNCTIONS) - ON_CPUS_ALONE - SEVERAL_LAUNCHES
    reasons = {Conv3x3BackwardInput: products.backward_input3x3_window_reason}
    return Backend(library.NAME, {kind: function(kind) for kind in kinds}, reasons)
