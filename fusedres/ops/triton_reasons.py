"""What the Triton kernels do not serve, and why: from any record that they have a kernel for to a code, or None."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor

from fusedres.ops import set_aside
from fusedres.ops.contract import (
    BnAddReluBackwardInput,
    BnAddReluBackwardReduce,
    BnAddReluForward,
    BnBackwardCoefficients,
    BnReluMaxpoolBackwardInput,
    BnReluMaxpoolBackwardReduce,
    BnReluMaxpoolForward,
    BnScaleShift,
    BnStats,
    Conv1x1BackwardInput,
    Conv1x1BackwardWeight,
    Conv1x1Forward,
    Conv1x1GramBackwardInput,
    Gram,
    GramBackwardCoefficients,
    GramOutputStats,
    RawOp,
    ReluBackward,
)

NAME = "triton"
DeviceReason = Callable[[Tensor], str | None]  # of the tensor that decides
Measured = Callable[[Conv1x1Forward], bool]  # whether the product is known to be no slower than the library's

# the argument of each op that decides: the output has its memory format, and the launch is on its device
DECIDING: dict[type, str] = {
    BnStats: "c",
    BnScaleShift: "mean",
    BnAddReluForward: "c",
    BnAddReluBackwardReduce: "c",
    BnBackwardCoefficients: "sum_dz",
    BnAddReluBackwardInput: "c",
    ReluBackward: "dy",
    BnReluMaxpoolForward: "c",
    BnReluMaxpoolBackwardReduce: "c",
    BnReluMaxpoolBackwardInput: "c",
    Conv1x1Forward: "x",
    Gram: "c",
    GramOutputStats: "weight",
    GramBackwardCoefficients: "weight",
    Conv1x1BackwardWeight: "c",
    Conv1x1GramBackwardInput: "c",
    Conv1x1BackwardInput: "c",
}
# products of activations; the other Gram ops multiply weights and moments alone, in float64 throughout
PRODUCTS = {Conv1x1Forward, Gram, Conv1x1BackwardWeight, Conv1x1GramBackwardInput, Conv1x1BackwardInput}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_ROWS = 2**31 - 2**16  # row numbers are 32-bit, offsets 64-bit; the difference is room for the last tile
OLDEST_CAPABILITY = (8, 0)  # bfloat16 products and asynchronous copies
# names of the GPUs on which a plain product of these kernels was measured to be faster than the library's
MEASURED_PRODUCTS: frozenset[str] = frozenset()
# compute capabilities with half as many float64 operations as float32 ones; on others of 8 and more it is one in 64
FULL_FLOAT64 = ((8, 0), (9, 0), (10, 0))


def activations(op: RawOp) -> list[Tensor] | None:
    """The op's activations and convolution weights, of four dimensions; None where a vector or mask is not dense.

    The kernels step through vectors and masks by 1: one of a strided or expanded parameter reads elsewhere.
    """
    wide = []
    for arg in op:  # plainly, for every call on a GPU pays for it
        if isinstance(arg, Tensor):
            if arg.dim() == 4:
                wide.append(arg)
            elif not arg.is_contiguous():
                return None
        elif isinstance(arg, tuple):  # vectors of a BN, or numbers
            for t in arg:
                if isinstance(t, Tensor) and not t.is_contiguous():
                    return None
    return wide


def widest(op: RawOp, wide: list[Tensor]) -> int:
    """The most channels that a product reads or writes, of its activations and weights."""
    cout = op.weight.shape[0] if isinstance(op, Conv1x1Forward) else 0
    return max(cout, *(t.shape[1] for t in wide))


@lru_cache(maxsize=4096)
def offsets_fit(kind: type, cin: int, widest: int) -> bool:
    """Whether offsets inside one program's share of the rows, and inside the weight, stay below 2^31."""
    from fusedres.triton_kernels import tiles

    rows = tiles.STATISTICS_ROWS
    if kind is Gram:
        rows = tiles.gram_rows(cin, tiles.output_tile(tiles.GRAM, cin, cin).bn)
    elif kind is Conv1x1BackwardWeight:
        rows = tiles.most_weight_rows(cin)
    return max(rows, 2 * widest) * widest < 2**31


def reason(op: RawOp, device_reason: DeviceReason, measured: Measured | None = None) -> str | None:
    """Why the kernels do not take this call, or None. measured: as for `fusedres.ops.triton.backend`."""
    tensor = getattr(op, DECIDING[type(op)])
    if (found := device_reason(tensor)) is not None:
        return found
    if set_aside.is_aside(NAME, type(op), tensor.device):
        return "set_aside"
    if measured is not None and isinstance(op, Conv1x1Forward) and not measured(op):
        return "product_not_measured"
    wide = activations(op)
    if wide is None:
        return "vector_not_dense"
    return activations_reason(op, tensor, wide) if tensor.dim() == 4 else None


def activations_reason(op: RawOp, tensor: Tensor, wide: list[Tensor]) -> str | None:
    """tensor: the one that decides, of the op's activations and weights."""
    dtype = tensor.dtype
    for t in wide:
        if t.dtype is not dtype and t.dtype is not torch.uint8:
            return "mixed_dtypes"
    if tensor.numel() == 0:
        return "empty"
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        return "not_channels_last"
    if tensor.numel() // tensor.shape[1] > MAX_ROWS:
        return "too_many_rows"
    if type(op) not in PRODUCTS:
        return None
    if not offsets_fit(type(op), tensor.shape[1], widest(op, wide)):
        return "too_many_channels"
    # TF32 would round a and W differently in the statistics than in the product
    return "float32_product" if tensor.is_cuda and tensor.dtype == torch.float32 else None


@cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def is_measured_product(op: Conv1x1Forward) -> bool:
    """Whether this product does what the library's does not, or was measured to be faster than it on this GPU."""
    return not op.x.is_cuda or op.in_scale is not None or device_name(op.x.device) in MEASURED_PRODUCTS


@cache
def has_full_float64(device: torch.device) -> bool:
    """Whether float64 arithmetic is at half of float32's rate on this GPU."""
    return capability(device) in FULL_FLOAT64


_usable: dict[torch.device, str | None] = {}


def unusable(device: torch.device) -> str | None:
    """Why no kernel at all can be compiled and run on this GPU, or None; tried once, with the smallest kernel."""
    if device in _usable:
        return _usable[device]
    if torch.cuda.is_current_stream_capturing():
        return "not_warm"  # loading a kernel, and waiting for what it wrote, would end the capture
    _usable[device] = found = probed(device)
    return found


def probed(device: torch.device) -> str | None:
    try:
        from fusedres.triton_kernels import probe

        with torch.cuda.device(device):
            written = probe.probe(device)
    except Exception as error:
        if not set_aside.is_of_toolchain(error):
            raise
        set_aside.warn_unusable(NAME, device, error)
        return "triton_unusable"
    if written == probe.WRITTEN:
        return None
    set_aside.warn_unusable(NAME, device, RuntimeError(f"a kernel wrote {written}, expected {probe.WRITTEN}"))
    return "triton_unusable"


def device_reason(tensor: Tensor, interpreted: bool) -> str | None:
    """Why Triton does not run on this tensor's device in its dtype, or None. interpreted: by Triton's interpreter."""
    if tensor.dtype not in DTYPES:
        return f"dtype_{str(tensor.dtype).removeprefix('torch.')}"
    if tensor.is_cuda:
        if torch.version.hip is not None:
            return "rocm"  # tiles, and the instruction that waits for a product, are NVIDIA's
        old = capability(tensor.device) < OLDEST_CAPABILITY
        return "compute_capability_below_8" if old else unusable(tensor.device)
    if not interpreted or tensor.device.type != "cpu":
        return f"device_{tensor.device.type}"
    # the interpreter multiplies bfloat16 as if its bits were integers
    return "bfloat16_interpreted" if tensor.dtype == torch.bfloat16 else None
