"""The native ops with the convolutions of one of Winograd's algorithms, whatever a call would be given."""

from __future__ import annotations

from functools import partial

from fusedres.ops.backend import Backend
from fusedres.ops.contract import Conv3x3Forward, ConvBackwardInput, ConvBackwardWeight
from fusedres.ops.native import functions, library, winograd


def with_tiles(largest: int) -> Backend:
    """largest: 4, or 2 for F(2x2, 3x3) alone."""
    library.load()
    convolutions = {
        Conv3x3Forward: partial(winograd.conv3x3_forward, largest=largest),
        ConvBackwardInput: partial(winograd.conv_backward_input, largest=largest),
        ConvBackwardWeight: partial(winograd.conv_backward_weight, largest=largest),
    }
    return Backend("winograd", {**functions.FUNCTIONS, **convolutions})
