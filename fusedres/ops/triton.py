"""Every raw op that Triton kernels serve: CUDA tensors, and CPU tensors under TRITON_INTERPRET=1.

Triton itself is imported at the first op that is served. Maths and shapes are in `fusedres.ops.contract`; kernels
and launchers, which know nothing of the rest of fusedres, in `fusedres.triton_kernels`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fusedres.ops import set_aside, triton_reasons
from fusedres.ops.backend import Backend, Function
from fusedres.ops.contract import (
    BatchNormGrads,
    BatchNormVectors,
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
    ConvOutput,
    Gram,
    GramBackwardCoefficients,
    GramGrads,
    GramOutputStats,
    RawOp,
    ReluBackward,
)
from fusedres.ops.reference import REFERENCE
from fusedres.ops.triton_reasons import DECIDING, NAME, DeviceReason, Measured

logger = logging.getLogger("fusedres")


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def launchers() -> ModuleType:
    from fusedres.triton_kernels import launchers

    return launchers


@cache
def launching() -> ModuleType:
    from fusedres.triton_kernels import launch

    return launch


def launches_to(listener: Callable[..., None]) -> AbstractContextManager[None]:
    """Within the context, in this thread, the listener is told of every launch: see `triton_kernels/launch.py`."""
    return launching().launches_to(listener)


def compiles_only(is_compiling: bool) -> AbstractContextManager[None]:
    """Within the context, in this thread, no kernel is launched, and the reference computes every op.

    is_compiling: whether the kernels are compiled; else they are left out.
    """
    launch = launching()
    return launch.instead_of_launching(launch.compile_for if is_compiling else launch.leave_out)


HERE = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else HERE


def launched(op: RawOp) -> Any:
    """The op's result, its kernels launched on the device of its tensors.

    Kernels that cannot be compiled or loaded are set aside, and the reference computes this call, as it does every one
    within `compiles_only`. The interpreter has no such excuse: what it raises is raised.
    """
    kind = type(op)
    tensor = getattr(op, DECIDING[kind])
    is_launching = launching().is_launching()
    try:
        with on_device_of(tensor):
            found = LAUNCHES[kind](op)
            if is_launching:
                return found
    except Exception as error:
        if is_interpreted():
            raise
        place = set_aside.Place(NAME, kind, tensor.device)
        if not set_aside.is_of_toolchain(error):
            set_aside.explain(error, place)
            raise
        if is_launching:
            set_aside.note(place, error)
        else:  # the launch that is to come finds it, says so, and sets the op aside
            logger.debug("%s was not compiled ahead: %s", kind.__name__, error)
    return REFERENCE(op)


def activation_vectors(
    vectors: BatchNormVectors, mask: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor] | None:
    """scale and shift where dz comes from the sign of `scale*c + shift`."""
    return (vectors.scale, vectors.shift) if mask is None and relu else None


def coefficients(grads: BatchNormGrads) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return grads.A, grads.B, grads.K


def bn_stats(op: BnStats) -> tuple[Tensor, Tensor]:
    return launchers().bn_stats(op.c)


def bn_scale_shift(op: BnScaleShift) -> BatchNormVectors:
    return BatchNormVectors(op.mean, op.var, *launchers().bn_scale_shift(*op))


def bn_add_relu_forward(op: BnAddReluForward) -> tuple[Tensor, Tensor | None]:
    c, scale, shift, residual, residual_scale, residual_shift, relu, save_mask, _ = op
    return launchers().bn_add_relu_forward(
        c, scale, shift, residual, residual_scale, residual_shift, relu, save_mask
    )


def bn_add_relu_backward_reduce(op: BnAddReluBackwardReduce) -> tuple[Tensor, Tensor, Tensor | None]:
    dy, c, vectors, mask, relu, shortcut_c, shortcut_mean = op
    activation = activation_vectors(vectors, mask, relu)
    return launchers().bn_add_relu_backward_reduce(
        dy, c, vectors.mean, activation, mask, shortcut_c, shortcut_mean
    )


def bn_backward_coefficients(op: BnBackwardCoefficients) -> BatchNormGrads:
    sum_dz, sum_dz_centered, vectors, rows, training = op
    dweight, B, K = launchers().bn_backward_coefficients(
        sum_dz, sum_dz_centered, vectors.mean, vectors.invstd, vectors.scale, rows, training
    )
    return BatchNormGrads(dweight, sum_dz, vectors.scale, B, K)


def bn_add_relu_backward_input(op: BnAddReluBackwardInput) -> tuple[Tensor, Tensor | None]:
    dy, c, vectors, grads, mask, relu, shortcut_c, shortcut_grads, save_dz, _, _ = op
    shortcut = None if shortcut_grads is None else coefficients(shortcut_grads)
    activation = activation_vectors(vectors, mask, relu)
    return launchers().bn_add_relu_backward_input(
        dy, c, activation, coefficients(grads), mask, shortcut_c, shortcut, save_dz
    )


def relu_backward(op: ReluBackward) -> Tensor:
    return launchers().relu_backward(op.dy, op.mask)


def bn_relu_maxpool_forward(op: BnReluMaxpoolForward) -> tuple[Tensor, Tensor | None]:
    *arguments, save_indices = op
    y, indices = launchers().bn_relu_maxpool_forward(*arguments)
    return y, indices if save_indices else None


def bn_relu_maxpool_backward_reduce(op: BnReluMaxpoolBackwardReduce) -> tuple[Tensor, Tensor]:
    dy, indices, c, vectors, *window = op
    return launchers().bn_relu_maxpool_backward_reduce(dy, indices, c, vectors.mean, *window)


def bn_relu_maxpool_backward_input(op: BnReluMaxpoolBackwardInput) -> Tensor:
    dy, indices, c, grads, *window = op
    return launchers().bn_relu_maxpool_backward_input(dy, indices, c, coefficients(grads), *window)


def conv1x1_forward(op: Conv1x1Forward) -> ConvOutput:
    return ConvOutput(*launchers().conv1x1_forward(*op))


def gram(op: Gram) -> tuple[Tensor, Tensor]:
    return launchers().gram(*op)


def gram_output_stats(op: GramOutputStats) -> tuple[Tensor, Tensor, Tensor]:
    return launchers().gram_output_stats(*op)


def gram_backward_coefficients(op: GramBackwardCoefficients) -> GramGrads:
    r, sum_dz, weight, bias, vectors, rows, m, S, center = op
    above = vectors.mean, vectors.invstd, vectors.scale
    return GramGrads(
        *launchers().gram_backward_coefficients(r, sum_dz, weight, bias, *above, rows, m, S, center)
    )


def conv1x1_backward_weight(op: Conv1x1BackwardWeight) -> tuple[Tensor, Tensor]:
    return launchers().conv1x1_backward_weight(*op)


def conv1x1_gram_backward_input(op: Conv1x1GramBackwardInput) -> tuple[Tensor, Tensor, Tensor]:
    dy, mask, c, vectors, *coefficients_above = op
    below = vectors.mean, vectors.scale, vectors.shift
    return launchers().conv1x1_gram_backward_input(dy, mask, c, *below, *coefficients_above)


def conv1x1_backward_input(op: Conv1x1BackwardInput) -> tuple[Tensor, Tensor]:
    dy, c, vectors, grads, weight, relu, shortcut_dy, shortcut_mask = op
    activation = activation_vectors(vectors, None, relu)
    return launchers().conv1x1_backward_input(
        dy, c, activation, coefficients(grads), weight, shortcut_dy, shortcut_mask
    )


LAUNCHES: dict[type, Function] = {
    BnStats: bn_stats,
    BnScaleShift: bn_scale_shift,
    BnAddReluForward: bn_add_relu_forward,
    BnAddReluBackwardReduce: bn_add_relu_backward_reduce,
    BnBackwardCoefficients: bn_backward_coefficients,
    BnAddReluBackwardInput: bn_add_relu_backward_input,
    ReluBackward: relu_backward,
    BnReluMaxpoolForward: bn_relu_maxpool_forward,
    BnReluMaxpoolBackwardReduce: bn_relu_maxpool_backward_reduce,
    BnReluMaxpoolBackwardInput: bn_relu_maxpool_backward_input,
    Conv1x1Forward: conv1x1_forward,
    Gram: gram,
    GramOutputStats: gram_output_stats,
    GramBackwardCoefficients: gram_backward_coefficients,
    Conv1x1BackwardWeight: conv1x1_backward_weight,
    Conv1x1GramBackwardInput: conv1x1_gram_backward_input,
    Conv1x1BackwardInput: conv1x1_backward_input,
}


def backend(device_reason: DeviceReason | None = None, measured: Measured | None = None) -> Backend:
    """The Triton backend.

    Args:
        device_reason: why it does not serve a tensor's dtype and device, as a code; None: what Triton itself takes
            in this process, CPU tensors only under TRITON_INTERPRET=1.
        measured: which plain products are served; None: all. Others are left to the library.
    """
    if device_reason is None:
        device_reason = partial(triton_reasons.device_reason, interpreted=is_interpreted())
    reason = partial(triton_reasons.reason, device_reason=device_reason, measured=measured)
    return Backend(NAME, dict.fromkeys(LAUNCHES, launched), dict.fromkeys(LAUNCHES, reason))
