"""Which calls of a block have run on a GPU: a CUDA graph being captured can hold those alone.

A first call compiles kernels and loads them, and has libraries choose theirs. CUDA refuses that inside of a capture,
and the capture is lost; so such a call is left to the original forward there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres.nn.residual_block import BlockCall
from fusedres.ops.dispatch import Dispatcher
from fusedres.patching import details
from fusedres.patching.state import BlockState

MOST_KNOWN = 256  # kinds of calls of one block: inputs of ever other sizes must not fill the memory


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def kind_of(block: BlockCall, recipe: str, ops: Dispatcher, gradients: bool) -> tuple[Any, ...]:
    """What decides which kernels a call of this block needs."""
    x = block.x
    modes = tuple([unit.training for unit in block.config.units])
    return x.shape, x.dtype, x.device, recipe, ops, modes, gradients


def not_warm(
    state: BlockState, block: BlockCall, recipe: str, ops: Dispatcher, gradients: bool
) -> str | None:
    """A reason if a CUDA graph is being captured and no call of this kind ran before; otherwise it is noted that one
    runs now. To be asked on a GPU."""
    kind = kind_of(block, recipe, ops, gradients)
    if kind in state.warm:
        return None
    if torch.cuda.is_current_stream_capturing():
        return details.of_input("not_warm", block.x)
    if len(state.warm) >= MOST_KNOWN:
        state.warm.clear()
    state.warm.add(kind)
    return None
