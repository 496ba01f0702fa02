"""Whether one call of a patched block may run fused: cheap checks, each with its reason code.

What a recipe cannot reproduce exactly goes to the original forward. Nothing is cached between calls. In the order of
their cost: `unfit_call`, `unfit_input`, then the modules (`structure.resolve`), `unreadable` on them, and `unfit_block`
on what was read from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.blocks.config import ConvBNConfig, ConvBNTensors, Shortcut
from fusedres.nn.residual_block import BlockCall, ConvBN, compute_dtype, tensor, unit_sizes
from fusedres.raw_ops import ACTIVATION_DTYPES

DISABLED: ContextVar[bool] = ContextVar("fusedres_disabled", default=False)
DISABLED_SCOPES: list[object] = []  # entered now, in any thread: what a graph being compiled goes by
PLAIN_TENSORS = (Tensor, nn.Parameter)
DEVICES = ("cpu", "cuda")
PROXY_MODE = torch._C._TorchDispatchModeKey.PROXY


def transformed() -> str | None:
    """A reason if torch is tracing, exporting or transforming: those want the original operations."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active():
        return "tracing"
    if not torch.compiler.is_dynamo_compiling() and torch._C._get_dispatch_mode(PROXY_MODE) is not None:
        return "tracing"
    return "forward_ad" if torch.autograd.forward_ad._current_level >= 0 else None


def unfit_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """A reason that lies in how the method is called, whatever the block."""
    if DISABLED_SCOPES and (torch.compiler.is_compiling() or DISABLED.get()):
        return "disabled"
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return "signature"
    if type(args[0]) not in PLAIN_TENSORS:
        return "tensor_subclass"
    return transformed()


def unfit_input(x: Tensor, casts: bool) -> str | None:
    """A reason if x cannot be served: rank, emptiness, device, dtype, layout.

    casts: x may be cast to the dtype of the convolutions first.
    """
    if x.layout is not torch.strided:
        return "tensor_subclass"
    if x.dim() != 4:
        return "input_rank"
    if x.numel() == 0:
        return "empty_batch"
    if x.device.type not in DEVICES:
        return "device"
    dtype = compute_dtype(x)
    # a residual is added in x's own dtype: a block that autocast would feed two dtypes is left to torch
    if dtype not in ACTIVATION_DTYPES or not (casts or x.dtype is dtype):
        return "dtype"
    if x.is_cuda and not x.is_contiguous(memory_format=torch.channels_last):
        return "layout_nchw"
    return None


def unreadable(units: Sequence[ConvBN]) -> str | None:
    """A reason if the modules cannot be read as a block's data."""
    for conv, bn, _ in units:
        if isinstance(conv.padding, str):
            return "geometry_changed"
        if conv.padding_mode != "zeros":
            return "attribute_changed"
        weight = tensor(conv, "weight")
        if weight is None or weight.dim() != 4:
            return "parameter_shape"
        if (tensor(bn, "running_mean") is None) != (tensor(bn, "running_var") is None):
            return "parameter_shape"
    norms = [id(unit.bn) for unit in units]
    return "shared_module" if len(set(norms)) < len(norms) else None


def unfit_tensors(
    t: ConvBNTensors, bn: nn.BatchNorm2d, x: Tensor, dtype: torch.dtype, autocast: bool
) -> str | None:
    """A reason if this convolution and BN cannot run on x: kinds of tensors, devices, dtypes, numbers of channels."""
    cout, device = t.weight.shape[0], x.device
    bn_dtype = None
    for i, value in enumerate((*t[:4], tensor(bn, "running_mean"), tensor(bn, "running_var"))):
        if value is None:
            continue
        if type(value) not in PLAIN_TENSORS or value.layout is not torch.strided:
            return "tensor_subclass"
        if value.device != device:
            return "device"
        if i and (value.dim() != 1 or value.numel() != cout):
            return "parameter_shape"
        if i > 1:
            if bn_dtype not in (None, value.dtype):
                return "dtype"
            bn_dtype = value.dtype
    conv_dtype = t.weight.dtype
    if conv_dtype is not dtype and not (autocast and conv_dtype is torch.float32):
        return "dtype"
    if t.conv_bias is not None and t.conv_bias.dtype is not conv_dtype:
        return "dtype"
    return None if bn_dtype in (None, dtype, torch.float32) else "dtype"


def unfit_geometry(unit: ConvBNConfig) -> bool:
    return (
        unit.stride[0] < 1
        or unit.stride[1] < 1
        or unit.dilation[0] < 1
        or unit.dilation[1] < 1
        or unit.padding[0] < 0
        or unit.padding[1] < 0
        or unit.groups < 1
    )


def unfit_block(call: BlockCall) -> str | None:
    """A reason if what was read of the block does not fit x, or does not fit together."""
    config, x = call.config, call.x
    main = len(config.main)
    autocast = torch.is_autocast_enabled(x.device.type)
    channels = x.shape[1]
    for i, (unit, t, bn) in enumerate(zip(config.units, call.tensors, call.norms, strict=True)):
        if (reason := unfit_tensors(t, bn, x, config.dtype, autocast)) is not None:
            return reason
        if unfit_geometry(unit):
            return "geometry_changed"
        shape = t.weight.shape
        if shape[1] * unit.groups != (x.shape[1] if i == main else channels):
            return "parameter_shape" if 0 < i < main else "input_channels"
        if i < main:
            channels = shape[0]
        elif shape[0] != channels:
            return "parameter_shape"
    return unfit_sizes(call, channels)


def unfit_sizes(call: BlockCall, channels: int) -> str | None:
    """A reason if the paths do not meet, or a BN would see one value per channel. channels: of the output."""
    config, x = call.config, call.x
    sizes = unit_sizes(call)
    if any(h < 1 or w < 1 for h, w in sizes):
        return "geometry_changed"
    end = sizes[len(config.main) - 1]
    if config.projection is not None and sizes[-1] != end:
        return "geometry_changed"
    if config.shortcut is Shortcut.IDENTITY and (channels, *end) != tuple(x.shape[1:]):
        return "geometry_changed"
    n = x.shape[0]
    if any(unit.training and n * h * w == 1 for unit, (h, w) in zip(config.units, sizes, strict=True)):
        return "single_value_per_channel"
    return None
