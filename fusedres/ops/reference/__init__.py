"""Every raw op in plain PyTorch: the specification, the fallback and the oracle of the tests.

The shortest code that is right, on any device, dtype and memory format, float64 included. Maths and shapes
are in `fusedres.ops.contract`.
"""

from __future__ import annotations

from fusedres.ops.backend import Backend
from fusedres.ops.reference import bn, conv, gram, pooling
from fusedres.ops.reference.values import pack_mask, unpack_mask

REFERENCE = Backend(
    "reference",
    {**bn.FUNCTIONS, **pooling.FUNCTIONS, **conv.FUNCTIONS, **gram.FUNCTIONS},
    is_plain=True,
)

__all__ = ["REFERENCE", "pack_mask", "unpack_mask"]
