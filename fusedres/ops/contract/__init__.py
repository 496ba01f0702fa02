"""The contract: every raw op of fusedres, with its maths, shapes, dtypes and memory format.

A raw op is a record, a named tuple of its arguments; a backend maps a record's type to a function that takes the
record (`fusedres.ops.backend`). Everything above is built on these records:

    y, mask = ops(BnAddReluForward(c, scale, shift, residual, save_mask=True))

Symbols
    N, C, H, W   batch, channels, height, width; rows P = N*H*W, the positions one channel has
    c            a raw convolution output            [N, C, H, W]
    a            an activation, after ReLU           [N, C, H, W]
    y            a block's output                    [N, C, H, W]
    d<name>      the gradient of <name>, like <name>
    dz           the gradient where it enters BN: `where(y <= 0, 0, dy)`, a select and never a product

Memory format
    Activations have logical shape [N, C, H, W]. An output takes the memory format of the tensor it is the
    gradient of, or else of `c`, `x` or `dy`, in this order. The native and Triton backends need channels_last
    ("NHWC": a row's C values lie side by side); the reference takes any.

Dtypes
    Activations and convolution weights: float16, bfloat16, float32, float64, one dtype per call.
    Channel vectors [C] and statistics: the accumulation dtype, float64 for float64 activations and float32
    otherwise. Sums are accumulated in it, in a fixed order: two runs are bitwise equal.
    Values are rounded to the activation dtype exactly where an activation is stored, and masks are taken
    from the rounded value.

Mask
    One bit an element, packed in uint8 of length ceil(N*C*H*W / 8): bit i of byte j belongs to element 8j+i
    of the tensor in NHWC order. A set bit means the gradient passes: `not (y <= 0)`, so NaN passes, as in torch.
    Bits past the last element are 0.

Kernels are pure: they never update running statistics, and write an argument only where the caller gives it away
(`reuse_c`, `reuse_dy`, `reuse_shortcut`), which a backend may ignore.
Formulas: Ioffe & Szegedy 2015 (batch normalisation); the Gram identity is derived in `fusedres.blocks.gram`.
"""

from __future__ import annotations

import re
from typing import Any

from fusedres.ops.contract.bn import (
    BnAddReluBackwardInput,
    BnAddReluBackwardReduce,
    BnAddReluForward,
    BnBackwardCoefficients,
    BnScaleShift,
    BnStats,
    ReluBackward,
)
from fusedres.ops.contract.conv import (
    Conv1x1BackwardInput,
    Conv1x1Forward,
    Conv3x3BackwardInput,
    Conv3x3Forward,
    ConvBackwardInput,
    ConvBackwardWeight,
    ConvOutput,
)
from fusedres.ops.contract.gram import (
    Conv1x1BackwardWeight,
    Conv1x1GramBackwardInput,
    Gram,
    GramBackwardCoefficients,
    GramGrads,
    GramOutputStats,
)
from fusedres.ops.contract.pooling import (
    BnReluMaxpoolBackwardInput,
    BnReluMaxpoolBackwardReduce,
    BnReluMaxpoolForward,
)
from fusedres.ops.contract.vectors import (
    ACTIVATION_DTYPES,
    BatchNormGrads,
    BatchNormVectors,
    accumulation_dtype,
)

RawOp = tuple[Any, ...]  # any record below


def op_name(op: type) -> str:
    """The name of a record's op, as it is printed and as kernels are called: `BnStats` is "bn_stats"."""
    return re.sub(r"(?<=.)([A-Z])", r"_\1", op.__name__).lower()


# every raw op by its name, in data-flow order
RAW_OPS: dict[str, type] = {
    op_name(op): op
    for op in (
        BnStats,
        BnScaleShift,
        BnAddReluForward,
        BnAddReluBackwardReduce,
        BnBackwardCoefficients,
        BnAddReluBackwardInput,
        ReluBackward,
        BnReluMaxpoolForward,
        BnReluMaxpoolBackwardReduce,
        BnReluMaxpoolBackwardInput,
        Conv1x1Forward,
        Gram,
        GramOutputStats,
        GramBackwardCoefficients,
        Conv1x1BackwardWeight,
        Conv1x1GramBackwardInput,
        Conv1x1BackwardInput,
        Conv3x3Forward,
        Conv3x3BackwardInput,
        ConvBackwardWeight,
        ConvBackwardInput,
    )
}

__all__ = [
    "ACTIVATION_DTYPES",
    "RAW_OPS",
    "BatchNormGrads",
    "BatchNormVectors",
    "BnAddReluBackwardInput",
    "BnAddReluBackwardReduce",
    "BnAddReluForward",
    "BnBackwardCoefficients",
    "BnReluMaxpoolBackwardInput",
    "BnReluMaxpoolBackwardReduce",
    "BnReluMaxpoolForward",
    "BnScaleShift",
    "BnStats",
    "Conv1x1BackwardInput",
    "Conv1x1BackwardWeight",
    "Conv1x1Forward",
    "Conv1x1GramBackwardInput",
    "Conv3x3BackwardInput",
    "Conv3x3Forward",
    "ConvBackwardInput",
    "ConvBackwardWeight",
    "ConvOutput",
    "Gram",
    "GramBackwardCoefficients",
    "GramGrads",
    "GramOutputStats",
    "RawOp",
    "ReluBackward",
    "accumulation_dtype",
    "op_name",
]
