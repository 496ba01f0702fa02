"""Why recipe "auto" leaves a call to the original forward, as a reason code with what was found and what is needed.

`choice` asks once nothing is known to be faster; the codes are in `fusedres.patching.reasons`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.ops.contract import BnStats
from fusedres.ops.dispatch import Dispatcher
from fusedres.ops.native import library


class Measured(NamedTuple):
    """A recipe, from which size and width on, and where it was found to be the fastest."""

    recipe: str
    least_elements: int  # of x; below, what a call costs outweighs what it saves
    least_channels: int  # out of the first convolution; narrower ones leave too little to save
    where: str

    def holds(self, elements: int, channels: int) -> bool:
        return elements >= self.least_elements and channels >= self.least_channels


# (device type, backend, dtype, gradients wanted) -> entries, of which the first that holds is taken
Table = dict[tuple[str, str, torch.dtype, bool], tuple[Measured, ...]]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def without_table() -> str:
    """Where no entry is for this machine at all."""
    if library.is_built():
        return f"not_measured_here:kernels for {library.instruction_set()}"
    return "native_missing"


def too_small(entries: tuple[Measured, ...], elements: int, channels: int | None) -> str:
    """Where entries are for such a call, but none for so few elements of x or channels of the first convolution."""
    wide = [e.least_elements for e in entries if channels is None or channels >= e.least_channels]
    if not wide:
        return f"too_small:{channels} channels, needed {min(e.least_channels for e in entries)}"
    return f"too_small:{elements:,} elements of x, needed {min(wide):,}"


def other_kinds(table: Table, device: str, dtype: torch.dtype, gradients: bool) -> str:
    """Where no entry is for the call's device, or dtype there."""
    dtypes = sorted({name(key[2]) for key in table if (key[0], key[3]) == (device, gradients)})
    if dtypes and name(dtype) not in dtypes:
        return f"dtype:input, {name(dtype)}, needed {' or '.join(dtypes)}"
    return f"not_measured_here:{device}, {name(dtype)}"


def other_backend(x: Tensor, backend: str, ops: Dispatcher) -> str:
    """Where the backend that was measured does not serve tensors like x, or was not asked for."""
    measured = next((b for b in ops.backends if b.name == backend), None)
    if measured is None:
        return f"not_measured_here:backend {ops.backends[0].name}"
    reason = measured.reason(BnStats(x))
    if reason == "not_channels_last":
        return f"layout_nchw:input, strides {x.stride()}"
    return f"not_measured_here:{backend}, {reason}"


def cause_of_size(table: Table, x: Tensor, channels: int | None, with_gradients: bool) -> str | None:
    """The code where no entry holds for so few elements or channels, of whatever dtype and backend; else None."""
    if not table:
        return without_table()
    device, elements = x.device.type, x.numel()
    smaller: tuple[Measured, ...] = ()
    for (of_device, _, dtype, gradients), entries in table.items():
        if of_device != device or gradients > with_gradients:
            continue
        for entry in entries:
            if elements >= entry.least_elements and (channels is None or channels >= entry.least_channels):
                return None
        if gradients == with_gradients and (dtype is x.dtype or not smaller):
            smaller = entries
    return (
        too_small(smaller, elements, channels)
        if smaller
        else other_kinds(table, device, x.dtype, with_gradients)
    )


def cause(
    table: Table, x: Tensor, dtype: torch.dtype, ops: Dispatcher, gradients: bool, channels: int
) -> str:
    """The code for a call of which nothing is known to be faster.

    Args:
        x: the block's input [N, C, H, W]; dtype: of its activations.
        gradients: whether any is wanted; channels: out of the first convolution.
    """
    if not table:
        return without_table()
    device = x.device.type
    for (of_device, backend, of_dtype, with_gradients), entries in table.items():
        if (of_device, of_dtype, with_gradients) == (device, dtype, gradients):
            if any(entry.holds(x.numel(), channels) for entry in entries):
                return other_backend(x, backend, ops)
            return too_small(entries, x.numel(), channels)
    return other_kinds(table, device, dtype, gradients)
