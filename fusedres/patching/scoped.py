"""Scoped use: patched within a context, or patched models running unfused within one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from fusedres.patching import guards, install
from fusedres.patching.api import check_model, patch, patched_blocks, unpatch

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def patched(model: Model, **options: Any) -> Iterator[Model]:
    """Within the context the model is patched; after it, also after an exception, it is as it was before.

    It raises what `fusedres.patch` raises and, on leaving, `fusedres.unpatch`.

    Args:
        model: as for `fusedres.patch`.
        options: as for `fusedres.patch`; the layout that channels_last=True gives the parameters stays.
    """
    check_model(model, "patched")
    before = [(block, copy.copy(vars(block)[install.STATE])) for _, block in patched_blocks(model)]
    patch(model, **options)
    try:
        yield model
    finally:
        unpatch(model)
        for block, state in before:
            install.install(block, state)


@contextmanager
def disabled() -> Iterator[None]:
    """Within the context, in this thread, patched models run their original forwards (code `disabled`)."""
    token = guards.DISABLED.set(True)
    guards.DISABLED_SCOPES.append(token)
    try:
        yield
    finally:
        guards.DISABLED_SCOPES.remove(token)
        guards.DISABLED.reset(token)
