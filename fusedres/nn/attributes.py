"""Reading a module's parameters and buffers past `nn.Module.__getattr__`, which is slow."""

from __future__ import annotations

from typing import Any

from torch import nn


def tensor(module: nn.Module, name: str) -> Any:
    """module.name for a parameter or buffer, or whatever else the module has by this name."""
    kept = module._parameters
    if name in kept:
        return kept[name]
    buffers = module._buffers
    return buffers[name] if name in buffers else getattr(module, name)
