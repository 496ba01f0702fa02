"""Which ops a recipe needs for a block, run on small tensors with the block's channels and judged against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fusedres.blocks.config import BlockConfig, ConvBNTensors
from fusedres.ops.backend import Backend
from fusedres.ops.cases import OpCase, Shape, cases
from fusedres.ops.contract import (
    BnReluMaxpoolBackwardInput,
    BnReluMaxpoolBackwardReduce,
    BnReluMaxpoolForward,
    Conv1x1BackwardWeight,
    Conv1x1GramBackwardInput,
    Gram,
    GramBackwardCoefficients,
    GramOutputStats,
    op_name,
)
from fusedres.ops.dispatch import Dispatcher
from fusedres.ops.selftest import outcome

LOST = "AcceleratorError"  # the GPU's context is gone: whatever runs next would fail too
BATCH, SIDE = 2, 7  # 98 values per channel
OF_GRAM = frozenset(
    (Gram, GramOutputStats, GramBackwardCoefficients, Conv1x1GramBackwardInput, Conv1x1BackwardWeight)
)
OF_POOLS = frozenset((BnReluMaxpoolForward, BnReluMaxpoolBackwardInput, BnReluMaxpoolBackwardReduce))


class Question(NamedTuple):
    """Which ops are to be proved: of channels (narrow, wide), and for which forms of blocks. backends: names."""

    device: torch.device
    dtype: torch.dtype
    narrow: int
    wide: int
    gram: bool
    pools: bool
    backends: tuple[str, ...]


class Fault(NamedTuple):
    """An op that is wrong on a backend, and how."""

    backend: str
    op: str
    problem: str


def questions_of(
    config: BlockConfig, units: tuple[ConvBNTensors, ...], gram: bool, ops: Dispatcher
) -> list[Question]:
    """For the channels inside the block and at its end, and for those into and out of each convolution before.

    gram: whether the ops of that recipe are meant too.
    """
    main = units[: len(config.main)]
    pairs = {(main[0].weight.shape[0], main[-1].weight.shape[0])}
    for unit, t in zip(config.main, main, strict=True):
        pairs.add((t.weight.shape[1] * unit.groups, t.weight.shape[0]))
    backends = tuple(backend.name for backend in ops.backends if not backend.is_plain)
    forms = gram, bool(config.pool), backends
    return [
        Question(units[0].weight.device, config.dtype, narrow, wide, *forms)
        for narrow, wide in sorted({(min(pair), max(pair)) for pair in pairs})
    ]


def asked(question: Question) -> Iterator[OpCase]:
    """The ops that the recipe may call, at the block's channels."""
    skipped = (frozenset() if question.gram else OF_GRAM) | (frozenset() if question.pools else OF_POOLS)
    shape = Shape(BATCH, SIDE, question.narrow, question.wide)
    return (c for c in cases(shape, question.dtype, question.device) if type(c.op) not in skipped)


def answer(
    question: Question,
    backends: tuple[Backend, ...],
    is_skipped: Callable[[str, str], bool] = lambda backend, op: False,
    begin: Callable[[str, str], None] = lambda backend, op: None,
) -> list[Fault]:
    """The first fault of each op on each backend. begin: called ahead of each; is_skipped: those not to run.

    Raises:
        RuntimeError: an op has lost the GPU's context.
    """
    faults: dict[tuple[str, str], Fault] = {}
    without_autocast = torch.autocast(question.device.type, enabled=False)
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), without_autocast:
        for case in asked(question):
            op = op_name(type(case.op))
            for backend in backends:
                place = backend.name, op
                if place in faults or is_skipped(*place) or backend.reason(case.op) is not None:
                    continue
                begin(*place)
                found = outcome(backend, question.device, question.dtype, case)
                if found.problem is not None and found.problem.startswith(LOST):
                    raise RuntimeError(f"fusedres: {'/'.join(place)}: {found.problem}")
                if found.problem is not None:
                    faults[place] = Fault(*place, found.problem)
    return list(faults.values())
