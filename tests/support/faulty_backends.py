"""Backends with one faulty op, in this process and in one that a proof begins."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from fusedres.ops import dispatch
from fusedres.ops.backend import Backend
from fusedres.ops.contract import BnAddReluForward
from fusedres.ops.reference import REFERENCE

NAME = "faulty"
OP = "bn_add_relu_forward"
right = REFERENCE.functions[BnAddReluForward]


def wrong(op: Any) -> Any:
    y, mask = right(op)
    return y * 1.001, mask


def raises(op: Any) -> Any:
    raise RuntimeError("a kernel that raises")


def runs_out_of_memory(op: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def loses_the_gpu(op: Any) -> Any:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def dies(op: Any) -> Any:
    os.kill(os.getpid(), 11)


FAULTS = {f.__name__: f for f in (wrong, raises, runs_out_of_memory, loses_the_gpu, dies)}


def backend(fault: str) -> Backend:
    """Right but for one op."""
    return Backend(NAME, {**REFERENCE.functions, BnAddReluForward: FAULTS[fault]})


def loaders(fault: str) -> dict[str, Any]:
    """In the place of those of `dispatch`."""
    return {NAME: lambda: backend(fault), REFERENCE.name: lambda: REFERENCE}


if __name__ == "__main__":  # as the process of a proof
    from fusedres.trials import proof_process

    dispatch.LOADERS.clear()
    dispatch.LOADERS.update(loaders(sys.argv[1]))
    if sys.argv[1:] == ["dies", "at once"]:
        sys.exit("no GPU for this process")
    proof_process.main()
