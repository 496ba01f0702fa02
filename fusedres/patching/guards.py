"""Whether one call of a patched block may run fused: cheap checks, each with its reason code.

What a recipe cannot reproduce exactly goes to the original forward. Nothing is cached between calls.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fusedres.blocks.config import Shortcut, Size, output_size
from fusedres.nn.residual_block import compute_dtype
from fusedres.nn.running_stats import uses_batch_statistics
from fusedres.nn.stem import single, unsuitable_pool
from fusedres.patching.plan import BlockPlan, ConvBNNames, Plan, StemPlan
from fusedres.raw_ops import ACTIVATION_DTYPES

DISABLED: ContextVar[bool] = ContextVar("fusedres_disabled", default=False)
PLAIN_TENSORS = (Tensor, nn.Parameter)
DEVICES = ("cpu", "cuda")


def transformed() -> str | None:
    """A reason if torch is tracing, exporting or transforming: those want the original operations."""
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting():
        return "tracing"
    if torch._C._are_functorch_transforms_active():
        return "tracing"
    return "forward_ad" if torch.autograd.forward_ad._current_level >= 0 else None


def has_hooks(module: Any) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def stem_changed(model: nn.Module, plan: Plan) -> str | None:
    """A reason if the submodules that a model's stem consists of are not those of the plan, or have hooks."""
    if has_global_hooks():
        return "hooks"
    for path, expected in plan.structure:
        module = model._modules.get(path)
        if module is None or type(module) is not expected:
            return "module_replaced"
        if has_hooks(module):
            return "hooks"
        if "forward" in vars(module):
            return "instance_forward"
    return None


def structure_changed(block: nn.Module, plan: Plan) -> str | None:
    """A reason if the submodules or the block's plain attributes are not those of the plan, or have hooks."""
    if has_global_hooks():
        return "hooks"
    modules = block.named_modules(remove_duplicate=False)
    next(modules)
    for path, expected in plan.structure:
        found, module = next(modules, (None, None))
        if module is None or found != path or type(module) is not expected:
            return "module_replaced"
        if has_hooks(module):
            return "hooks"
        if "forward" in vars(module):
            return "instance_forward"
    if next(modules, None) is not None:
        return "module_replaced"
    for path, values in plan.attributes or ():
        attributes = vars(block.get_submodule(path))
        if any(attributes.get(k, plan) != v for k, v in values):
            return "attribute_changed"
    return None


def unfit_tensor(tensor: Tensor | None, x: Tensor) -> str | None:
    if tensor is None:
        return None
    if type(tensor) not in PLAIN_TENSORS:
        return "tensor_subclass"
    return None if tensor.device == x.device else "device"


def unfit_unit(block: nn.Module, names: ConvBNNames, x: Tensor, dtype: torch.dtype) -> str | None:
    """A reason if this convolution and BN cannot run on x: kinds of tensors, devices, dtypes."""
    conv, bn = block.get_submodule(names.conv), block.get_submodule(names.bn)
    tensors = (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    for tensor in tensors:
        if (reason := unfit_tensor(tensor, x)) is not None:  # type: ignore[arg-type]
            return reason
    conv_dtypes = (dtype, torch.float32) if torch.is_autocast_enabled(x.device.type) else (dtype,)
    if conv.weight.dtype not in conv_dtypes or (
        conv.bias is not None and conv.bias.dtype is not conv.weight.dtype
    ):
        return "dtype"
    bn_dtypes = {t.dtype for t in tensors[2:] if t is not None}
    # a frozen norm is plain arithmetic: constants of another dtype would change the result's
    if len(bn_dtypes) > 1 or not bn_dtypes <= ({dtype} if names.frozen else {dtype, torch.float32}):
        return "dtype"
    if names.frozen and (bn.running_mean.requires_grad or bn.running_var.requires_grad):
        return "trainable_statistics"
    if conv.padding_mode != "zeros":
        return "attribute_changed"
    return None


def unfit_input(block: nn.Module, plan: Plan, x: Tensor) -> str | None:
    """A reason if x itself cannot be served: rank, channels, emptiness, dtype, device, layout."""
    if x.dim() != 4:
        return "input_rank"
    first = block.get_submodule(plan.main[0].conv)
    if x.shape[1] != first.in_channels:
        return "input_channels"
    if x.numel() == 0:
        return "empty_batch"
    if x.device.type not in DEVICES:
        return "device"
    dtype = compute_dtype(x)
    # a residual is added in x's own dtype: a block that autocast would feed two dtypes is left to torch
    if dtype not in ACTIVATION_DTYPES or (x.dtype is not dtype and isinstance(plan, BlockPlan)):
        return "dtype"
    if x.is_cuda and not x.is_contiguous(memory_format=torch.channels_last):
        return "layout_nchw"
    return None


def size_after(block: nn.Module, names: tuple[ConvBNNames, ...], x: Tensor) -> Size:
    """Height and width after these convolutions."""
    size: Size = (x.shape[2], x.shape[3])
    for unit in names:
        conv: Any = block.get_submodule(unit.conv)
        size = output_size(size, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return size


def pooling(model: nn.Module, plan: StemPlan) -> nn.MaxPool2d | None:
    """The stem's pooling as it is now."""
    if isinstance(plan.pool, str):
        return model.get_submodule(plan.pool)  # type: ignore[return-value]
    return None if plan.pool is None else nn.MaxPool2d(*plan.pool)


def unfit_pool(pool: nn.MaxPool2d | None, size: Size) -> bool:
    """Whether a pooling rewritten since patching is outside what the stem serves, or has no output at all."""
    if pool is None:
        return False
    if unsuitable_pool(pool):
        return True
    kernel, padding = single(pool.kernel_size), single(pool.padding)
    return 2 * padding > kernel or min(size) + 2 * padding < kernel  # type: ignore[operator]


def unfit_shapes(block: nn.Module, plan: Plan, x: Tensor) -> str | None:
    """A reason if geometries rewritten since patching no longer meet, or BN would see one value per channel."""
    for unit in plan.units:
        conv: Any = block.get_submodule(unit.conv)
        if isinstance(conv.padding, str):
            return "geometry_changed"
    size = size_after(block, plan.main, x)
    if min(size) < 1 or (isinstance(plan, StemPlan) and unfit_pool(pooling(block, plan), size)):
        return "geometry_changed"
    if plan.projection is not None and size_after(block, (plan.projection,), x) != size:
        return "geometry_changed"
    if plan.shortcut is Shortcut.IDENTITY and size != tuple(x.shape[2:]):
        return "geometry_changed"
    for i in range(len(plan.main)):
        h, w = size_after(block, plan.main[: i + 1], x)
        if plan.main[i].frozen or x.shape[0] * h * w > 1:
            continue
        if uses_batch_statistics(block.get_submodule(plan.main[i].bn)):  # type: ignore[arg-type]
            return "single_value_per_channel"
    return None


def refusal(block: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The reason code for running this call by the original forward, or None."""
    if DISABLED.get():
        return "disabled"
    if (reason := transformed()) is not None:
        return reason
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return "signature"
    x = args[0]
    if type(x) not in PLAIN_TENSORS:
        return "tensor_subclass"
    changed = structure_changed(block, plan) if plan.whole else stem_changed(block, plan)
    if (reason := changed or unfit_input(block, plan, x)) is not None:
        return reason
    dtype = compute_dtype(x)
    for unit in plan.units:
        if (reason := unfit_unit(block, unit, x, dtype)) is not None:
            return reason
    return unfit_shapes(block, plan, x)
