"""Lazy modules that no call has initialised: their parameters have no shape yet, so nothing about them can be read."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, is_lazy


def is_uninitialised(module: nn.Module) -> bool:
    """Whether the module or one below it waits for a first call: also where only its parameters were loaded."""
    return any(
        (isinstance(m, LazyModuleMixin) and "_initialize_hook" in vars(m))
        or any(is_lazy(t) for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
        for m in module.modules()
    )


def initialised_copy(model: nn.Module, example: tuple[Any, ...]) -> nn.Module:
    """A deep copy; where lazy modules wait for a first call, the copy has had that, on the example.

    The model and the random number generators are left as they are.
    """
    memo: dict[int, Any] = {}
    for buffer in model.buffers():
        if isinstance(buffer, UninitializedBuffer):  # torch copies uninitialised parameters only
            memo[id(buffer)] = UninitializedBuffer(device=buffer.device, dtype=buffer.dtype)  # type: ignore[call-arg]
    made = copy.deepcopy(model, memo)
    if is_uninitialised(made):
        devices = sorted({p.device for p in made.parameters() if p.is_cuda}, key=str)
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            made(*example)
    return made
