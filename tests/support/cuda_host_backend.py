"""The native backend as it is on a GPU, of the host build: for blocks and models on CPU tensors."""

from __future__ import annotations

import torch
from cuda_host_ops import HostCudaOps

from fusedres.ops.backend import Backend, Reason
from fusedres.ops.contract import Conv3x3BackwardInput, ConvBackwardInput, ConvBackwardWeight, RawOp
from fusedres.ops.native import functions, library, products

LIBRARY_ON_GPUS = {ConvBackwardInput, ConvBackwardWeight}  # whose kernels are the CPU's alone
HALF_DTYPES = (torch.float16, torch.bfloat16)


def product_reason(deciding: str) -> Reason:
    def reason(op: RawOp) -> str | None:
        if isinstance(op, Conv3x3BackwardInput) and (found := products.backward_input3x3_window_reason(op)):
            return found
        return None if getattr(op, deciding).dtype in HALF_DTYPES else "float32_product"

    return reason


def backend(ops: HostCudaOps) -> Backend:
    """Every op that the native backend has on a GPU; what it does not take there of a model in channels_last."""
    reasons = {kind: product_reason(deciding) for kind, (deciding, _) in products.PRODUCTS.items()}
    kinds = [kind for kind in functions.FUNCTIONS if kind not in LIBRARY_ON_GPUS]
    return Backend(library.NAME, dict.fromkeys(kinds, ops), reasons)
