"""Whether one call of a patched block may run fused: cheap checks, each with its reason code.

What a recipe cannot reproduce exactly goes to the original forward. Nothing is cached between calls. In the order of
their cost: `unfit_call`, `transformed`, `unfit_input`, then the modules (`resolve`), `unreadable` on them,
and `unfit_block` on what was read from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state

from fusedres.blocks.config import ConvBNConfig, ConvBNTensors, Shortcut, unit_sizes
from fusedres.matching.norms import FrozenNorm
from fusedres.matching.plan import Plan
from fusedres.nn.attributes import tensor
from fusedres.nn.residual_block import BlockCall, ConvBN, compute_dtype
from fusedres.ops.contract import ACTIVATION_DTYPES
from fusedres.patching import details

DISABLED: ContextVar[bool] = ContextVar("fusedres_disabled", default=False)
DISABLED_SCOPES: list[object] = []  # entered now, in any thread: what a graph being compiled goes by
PLAIN_TENSORS = (Tensor, nn.Parameter)
DEVICES = ("cpu", "cuda")
PROXY_MODE = torch._C._TorchDispatchModeKey.PROXY
FAKE_MODE = torch._C._TorchDispatchModeKey.FAKE


def differentiated() -> str | None:
    """A reason if torch is exporting or transforming, where no dispatch mode is on."""
    if torch.compiler.is_exporting():
        return "tracing:torch.export"
    if torch._C._are_functorch_transforms_active():
        return "tracing:torch.func"
    return "forward_ad" if torch.autograd.forward_ad._current_level >= 0 else None


def transformed() -> str | None:
    """A reason if torch is exporting, transforming or only working out shapes: those want the original operations."""
    if (reason := differentiated()) is not None:
        return reason
    if not torch.compiler.is_dynamo_compiling():  # a graph being compiled has operators that they know
        if torch._C._get_dispatch_mode(PROXY_MODE) is not None:
            return "tracing:make_fx"
        if torch._C._get_dispatch_mode(FAKE_MODE) is not None:
            return "fake_mode"
    return None


def unfit_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """A reason that lies in how the method is called, whatever the block; `transformed` is asked apart."""
    if DISABLED_SCOPES and (torch.compiler.is_compiling() or DISABLED.get()):
        return "disabled"
    if len(args) != 1 or kwargs:
        return details.signature(args, kwargs)
    if type(args[0]) not in PLAIN_TENSORS:
        is_tensor = isinstance(args[0], Tensor)
        return details.of_input("tensor_subclass", args[0]) if is_tensor else details.signature(args, kwargs)
    return "tracing:torch.jit" if _get_tracing_state() is not None else None  # sizes are tensors there


def unfit_input(x: Tensor, casts: bool) -> str | None:
    """A reason if x cannot be served: rank, emptiness, device, dtype, layout.

    casts: x may be cast to the dtype of the convolutions first.
    """
    if x.layout is not torch.strided:
        return details.of_input("tensor_subclass", x)
    if x.dim() != 4:
        return details.of_input("input_rank", x)
    if x.numel() == 0:
        return details.of_input("empty_batch", x)
    if x.device.type not in DEVICES:
        return details.of_input("device", x)
    dtype = compute_dtype(x)
    # a residual is added in x's own dtype: a block that autocast would feed two dtypes is left to torch
    if dtype not in ACTIVATION_DTYPES or not (casts or x.dtype is dtype):
        return details.of_input("dtype", x, dtype)
    if x.is_cuda and not x.is_contiguous(memory_format=torch.channels_last):
        return details.of_input("layout_nchw", x)
    return None


def unreadable(units: Sequence[ConvBN], plan: Plan) -> str | None:
    """A reason if the modules cannot be read as a block's data."""
    for conv, bn, _ in units:
        if conv.padding_mode != "zeros":
            return details.of_module("attribute_changed", conv, units, plan, "padding_mode")
        weight = tensor(conv, "weight")
        if weight is not None and type(weight) not in PLAIN_TENSORS:
            # of a lazy module it has no dimensions to ask for
            return details.of_module("tensor_subclass", conv, units, plan, "weight")
        if weight is None or weight.dim() != 4:
            return details.of_module("parameter_shape", conv, units, plan, "weight")
        if (tensor(bn, "running_mean") is None) != (tensor(bn, "running_var") is None):
            return details.of_module("parameter_shape", conv, units, plan, "running_mean")
    return details.shared_norm(units, plan) if len({id(bn) for _, bn, _ in units}) < len(units) else None


def unfit_tensors(
    tensors: Sequence[Tensor],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    call: BlockCall,
    plan: Plan,
) -> str | None:
    """A reason unless all are plain, on that device, and of one and the same of the dtypes."""
    first = tensors[0].dtype if tensors else None
    for t in tensors:
        if type(t) not in PLAIN_TENSORS or t.layout is not torch.strided:
            return details.of_tensor("tensor_subclass", t, call, plan)
        if t.device != device:
            return details.of_tensor("device", t, call, plan, device)
        dtype = t.dtype
        if dtype is not first or dtype not in dtypes:
            return details.of_tensor("dtype", t, call, plan, first if first in dtypes else dtypes[0])
    return None


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


def is_nchw(weight: Tensor) -> bool:
    """By strides alone, as torch's convolution reads a layout: a 1x1 weight is contiguous in both."""
    _, cin, height, width = weight.shape
    return weight.stride() == (cin * height * width, height * width, width, 1)


def is_refused_by_graphs(x: Tensor) -> bool:
    """Whether x was made in inference mode, and graphs are recorded now. Dynamo asks no tensor about it."""
    return not torch.compiler.is_dynamo_compiling() and x.is_inference() and torch.is_grad_enabled()


def gives_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether a stem's output is channels_last though its images are not: by its weight, whatever way it is spelled.

    Images that want a gradient are left as they are: theirs would come in another layout. So are images that torch
    refuses to save for backward: of a copy it would not see what they are.
    """
    if x.requires_grad or is_refused_by_graphs(x) or x.is_contiguous(memory_format=torch.channels_last):
        return False
    return weight.is_contiguous(memory_format=torch.channels_last) and not is_nchw(weight)


def taken_by_stem(x: Tensor, weight: Tensor) -> Tensor:
    """The images in the dtype and layout of the stem's convolution."""
    dtype = compute_dtype(x)
    x = x if x.dtype is dtype else x.to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if gives_channels_last(x, weight) else x


def norm_vectors(t: ConvBNTensors, bn: nn.BatchNorm2d) -> list[Tensor]:
    """Every vector that the BN has, whether the call reads it or moves it."""
    mean, var = t.mean, t.var
    if mean is None and var is None:  # or frozen ones, which were read
        mean, var = tensor(bn, "running_mean"), tensor(bn, "running_var")
    return [v for v in (t.bn_weight, t.bn_bias, mean, var) if v is not None]


def unfit_frozen(call: BlockCall, plan: Plan) -> str | None:
    """A reason if a frozen norm's constants would give another dtype, which its arithmetic promotes, or a gradient."""
    for t, bn in zip(call.tensors, call.norms, strict=True):
        if type(bn) is not FrozenNorm:
            continue
        for v in norm_vectors(t, bn):
            if v.dtype is not call.config.dtype:
                return details.of_tensor("dtype", v, call, plan, call.config.dtype)
        for v in (t.mean, t.var):
            if v is not None and v.requires_grad:
                return details.of_tensor("trainable_statistics", v, call, plan)
    return None


def unfit_block(call: BlockCall, plan: Plan) -> str | None:
    """A reason if what was read of the block does not fit x, or does not fit together."""
    config, x = call.config, call.x
    device = x.device
    norms = [norm_vectors(t, bn) for t, bn in zip(call.tensors, call.norms, strict=True)]
    convs = [t for unit in call.tensors for t in unit[:2] if t is not None]
    castable = (config.dtype, torch.float32)
    casts = torch.is_autocast_enabled(device.type) and config.dtype is not torch.float64
    dtypes = castable if casts else castable[:1]
    reason = unfit_tensors(convs, device, dtypes, call, plan)
    vectors = [v for n in norms for v in n]
    if (reason := reason or unfit_tensors(vectors, device, castable, call, plan)) is not None:
        return reason
    if (reason := unfit_frozen(call, plan)) is not None:
        return reason
    for i, unit in enumerate(config.units):
        if unfit_geometry(unit):
            return details.geometry(unit, plan.units[i].conv)
        if not unit.eps > 0 and (unit.training or unit.eps != 0):
            return details.detailed("eps_not_positive", f"{plan.units[i].bn}.eps", unit.eps)
    if not x.is_contiguous(memory_format=torch.channels_last):
        for t in call.tensors:
            if not is_nchw(t.weight):
                return details.of_tensor("layout_mixed", t.weight, call, plan)
    for t, own in zip(call.tensors, norms, strict=True):
        given, channels = own if t.conv_bias is None else (*own, t.conv_bias), t.weight.shape[0]
        for v in given:
            if v.dim() != 1 or v.numel() != channels:
                return details.of_tensor("parameter_shape", v, call, plan, [channels])
    return unfit_channels(call, plan) or unfit_sizes(call, plan)


def unfit_channels(call: BlockCall, plan: Plan) -> str | None:
    """A reason if a convolution's channels are not those that the one before, or x, gives."""
    config = call.config
    main = len(config.main)
    given = channels = call.x.shape[1]
    for i, (unit, t) in enumerate(zip(config.units, call.tensors, strict=True)):
        shape = t.weight.shape
        if shape[1] * unit.groups != (channels if i < main else given):
            takes, name = shape[1] * unit.groups, plan.units[i].conv
            if i in (0, main):
                return details.counts("input_channels", f"input of {name}", given, takes)
            return details.counts("parameter_shape", f"{name}.weight", takes, channels)
        if i < main:
            channels = shape[0]
        elif shape[0] != channels:
            return details.counts("parameter_shape", f"{plan.units[i].conv}.weight", shape[0], channels)
    if config.shortcut is Shortcut.IDENTITY and channels != given:
        return details.counts("parameter_shape", f"{plan.units[main - 1].conv}.weight", channels, given)
    return None


def unfit_sizes(call: BlockCall, plan: Plan) -> str | None:
    """A reason if the paths do not meet, or a BN would see one value per channel."""
    config, x = call.config, call.x
    sizes = unit_sizes(config, call.tensors, x)
    for i, (h, w) in enumerate(sizes):
        if h < 1 or w < 1:
            return details.sizes(plan.units[i].conv, (h, w))
    end = sizes[len(config.main) - 1]
    if config.projection is not None and sizes[-1] != end:
        return details.sizes(plan.main[-1].conv, end, sizes[-1])
    if config.shortcut is Shortcut.IDENTITY and end != tuple(x.shape[2:]):
        return details.sizes(plan.main[-1].conv, end, x.shape[2:])
    if config.pool is not None:
        kernel, stride, padding = config.pool
        if not (stride >= 1 and 0 <= 2 * padding <= kernel <= min(end) + 2 * padding):
            return details.pooling(config.pool, plan)
    n = x.shape[0]
    for i, (unit, (h, w)) in enumerate(zip(config.units, sizes, strict=True)):
        if n * h * w == 1 and unit.training:
            return details.detailed("single_value_per_channel", plan.units[i].bn)
    return None
