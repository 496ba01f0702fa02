"""The compiled kernels of `csrc/` as a backend: an adapter from `RawOps` to the ops of `fusedres_native`.

The library is `libfusedres_native.so` beside the package; `load` brings it in. What it does not serve (other
dtypes, memory formats and devices, ops without a kernel) gets a reason from `supports`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fusedres.errors import BackendUnavailableError
from fusedres.raw_ops import BatchNormGrads, BatchNormVectors, Conv1x1Output, RawOps

LIBRARY = Path(__file__).resolve().parent.parent / "libfusedres_native.so"
LIBRARY_OPS = (
    "bn_stats",
    "bn_scale_shift",
    "bn_add_relu_forward",
    "bn_add_relu_backward_reduce",
    "bn_backward_coefficients",
    "bn_add_relu_backward_input",
    "relu_backward",
    "bn_relu_maxpool_forward",
    "bn_relu_maxpool_backward_reduce",
    "bn_relu_maxpool_backward_input",
    "conv1x1_forward",
    "conv_backward_input",
    "conv_backward_input_",
    "conv_backward_weight",
    "cpu_capability",
    "cpu_multiplies_bfloat16",
    "cpu_products_of_bfloat16",
    "cuda_archs",
    "cuda_version",
    "cuda_device_problem",
)
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

# conv_backward_weight, against oneDNN 3.12 at ResNet-50's shapes, batch 16, on two cores each of Zen 3, Zen 5 and
# Cascade Lake
FEWEST_CHANNELS = 64
FEWEST_WEIGHTS = 128 * 256  # of a pointwise convolution
FEWEST_SUMMED = 128  # channels of bfloat16, of a 1x1 convolution in inference: on Zen 5
FEWEST_WEIGHTS_PER_THREAD = 2048  # with fewer, shares are too small or unequal


def is_built() -> bool:
    """Whether this installation has the compiled library, loadable or not."""
    return LIBRARY.is_file()


@cache
def load() -> None:
    """Loads the library, once; after this `torch.ops.fusedres_native` has the operators.

    Raises:
        BackendUnavailableError: it is not there, or not loadable with this torch or on this processor.
    """
    if not is_built():
        raise BackendUnavailableError(
            f"fusedres: the native backend needs {LIBRARY}, which is not there. "
            "Install a wheel that has it, or build from source with g++ (FUSEDRES_BUILD=cpu pip install .)."
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise BackendUnavailableError(
            f"fusedres: {LIBRARY} does not load with torch {torch.__version__}: {error}. "
            "Reinstall fusedres for this torch, or use backend='reference'."
        ) from error
    missing = [op for op in LIBRARY_OPS if not hasattr(torch.ops.fusedres_native, op)]
    if missing:
        raise BackendUnavailableError(
            f"fusedres: {LIBRARY} was built from other sources, it lacks {', '.join(missing)}. "
            "Build it again with the package: pip install ."
        )
    if torch.ops.fusedres_native.cpu_capability() == "none":
        raise BackendUnavailableError(
            "fusedres: the native backend needs a processor with AVX2 and FMA. Use backend='reference'."
        )


def loaders() -> dict[str, Callable[[], RawOps]]:
    """{"native": NativeOps} where the library loads, else {}; warns where it is there and does not load."""
    if not is_built():
        return {}
    try:
        load()
    except BackendUnavailableError as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        return {}
    return {NativeOps.name: cast(Callable[[], RawOps], NativeOps)}


def instruction_set() -> str | None:
    """What the CPU kernels use on this processor: "avx2" or "avx512"; None where the library is not loaded."""
    ask = getattr(torch.ops.fusedres_native, "cpu_capability", None)
    return ask() if ask else None


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16; False where the library is not loaded."""
    ask = getattr(torch.ops.fusedres_native, "cpu_multiplies_bfloat16", None)
    return bool(ask and ask())


@cache
def device_reason(device: torch.device) -> str | None:
    """Why the library does not run on this device, or None; warns, once, where a GPU is not served."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"device_{device.type}"
    problem = torch.ops.fusedres_native.cuda_device_problem(device.index or 0)
    if not problem:
        return None
    warnings.warn(
        f"fusedres: {LIBRARY.name} does not run on {device} ({torch.cuda.get_device_name(device)}): {problem}. "
        "Other backends serve it; `fusedres doctor` says what to install.",
        RuntimeWarning,
        stacklevel=2,
    )
    return "no_code_for_device"


def activations_reason(*activations: Tensor | None) -> str | None:
    """Why the kernels do not take these activations together, or None. The first is not None."""
    first = activations[0]
    assert first is not None
    device, dtype = first.device, first.dtype
    if not first.is_cpu and (reason := device_reason(device)) is not None:
        return reason
    if dtype not in DTYPES[device.type]:
        return f"dtype_{str(dtype).removeprefix('torch.')}"
    for t in activations:
        if t is None:
            continue
        if t.dim() != 4 or (t is not first and (t.dtype is not dtype or t.device != device)):
            return "arguments_differ"
        if not t.is_contiguous(memory_format=torch.channels_last):
            return "layout_not_channels_last"
    return None if first.shape[1] else "no_channels"


def vectors_reason(first: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels do not take these channel vectors, or None."""
    device = first.device
    if not first.is_cpu and (reason := device_reason(device)) is not None:
        return reason
    for v in (first, *others):
        if v is None:
            continue
        if v.dtype is not torch.float32 or not v.is_contiguous() or (v is not first and v.device != device):
            return "vector_not_float32"
    return None


def forward_reason(c: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, *rest: Any):
    return activations_reason(c, residual)


def reduce_reason(dy, c, vectors, mask=None, relu=True, shortcut_c=None, *rest):
    return activations_reason(c, dy, shortcut_c)


def input_reason(dy, c, vectors, grads, mask=None, relu=True, shortcut_c=None, *rest):
    return activations_reason(c, dy, shortcut_c)


@cache
def fused_convolution_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes of oneDNN's convolution with an addition on this processor."""
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return ()
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)


def conv_reason(x, weight, bias, residual, *rest):
    if x.device.type != "cpu" or x.dtype not in fused_convolution_dtypes() or not x.numel():
        return "no_fused_convolution"
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return "arguments_differ"
    if residual is not None and residual.is_contiguous():
        return (
            "layout_ambiguous"  # one position or one channel, in both formats at once: torch 2.10 fails there
        )
    return activations_reason(x, residual)


def weight_gradient_reason(dy, x, kernel_size, stride, padding, dilation, groups):
    """oneDNN is left what it does as fast: few channels, pointwise convolutions without many, and many threads."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return "no_kernel"
    if groups != 1:
        return "groups"
    cin, cout = x.shape[1], dy.shape[1]
    pointwise = tuple(kernel_size) == tuple(stride) == (1, 1)
    if min(cin, cout) < FEWEST_CHANNELS or (pointwise and cin * cout <= FEWEST_WEIGHTS):
        return "library_as_fast"
    if cin * cout * prod(kernel_size) < FEWEST_WEIGHTS_PER_THREAD * torch.get_num_threads():
        return "too_many_threads"
    if dy.dim() != 4 or dy.dtype != x.dtype or dy.device != x.device:
        return "arguments_differ"
    channels_last = all(t.is_contiguous(memory_format=torch.channels_last) for t in (dy, x))
    return None if channels_last else "layout_not_channels_last"


@cache
def product_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes of which 1x1 convolutions have kernels on this processor."""
    load()
    half = torch.ops.fusedres_native.cpu_products_of_bfloat16()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)


def pointwise_reason(x: Tensor, weight: Tensor, depth: int) -> str | None:
    """Why the kernels do not take a 1x1 convolution between x's channels and others; depth: those summed over."""
    if x.device.type != "cpu" or x.dtype not in product_dtypes():
        return "no_kernel"
    if weight.shape[2:] != (1, 1):
        return "not_pointwise"
    if x.dtype != torch.float32 and depth % 2:
        return "odd_channels"
    if weight.dtype != x.dtype or not weight.is_contiguous(memory_format=torch.channels_last):
        return "arguments_differ"
    return None


def product_reason(
    x,
    weight,
    bias=None,
    stride=1,
    in_scale=None,
    in_shift=None,
    scale=None,
    shift=None,
    residual=None,
    residual_scale=None,
    residual_shift=None,
    relu=False,
    save_mask=False,
    save_stats=False,
):
    """In inference, where BN's vectors are known before the product: it is stored once, and nothing else."""
    if scale is None or save_mask or save_stats or in_scale is not None:
        return "in_training"
    if stride != 1 or bias is not None:
        return "not_pointwise"
    if (reason := pointwise_reason(x, weight, x.shape[1])) is not None:
        return reason
    if x.dtype != torch.float32 and x.shape[1] < FEWEST_SUMMED:
        return "library_as_fast"
    return activations_reason(x, residual) or vectors_reason(scale, shift, residual_scale, residual_shift)


def input_gradient_reason(
    dy, x, weight, stride, padding, dilation, groups, shortcut_dy=None, shortcut_mask=None
):
    """A 1x1 convolution's is a product, added where eager stores it and adds it in a pass of its own."""
    if tuple(padding) != (0, 0) or groups != 1:
        return "not_pointwise"
    if (reason := pointwise_reason(x, weight, dy.shape[1])) is not None:
        return reason
    strided = tuple(stride) != (1, 1)
    if shortcut_dy is None and (strided or x.dtype != torch.float32):
        return "library_as_fast"
    if shortcut_mask is not None and (strided or x.shape[1] % 8 != 0):
        return "mask"
    return activations_reason(x, dy, shortcut_dy)


REASONS: dict[str, Callable[..., str | None]] = {
    "bn_stats": activations_reason,
    "bn_scale_shift": lambda mean, var, weight, bias, eps: vectors_reason(mean, var, weight, bias),
    "bn_add_relu_forward": forward_reason,
    "bn_add_relu_backward_reduce": reduce_reason,
    "bn_backward_coefficients": lambda sum_dz, centered, vectors, *rest: vectors_reason(sum_dz, *vectors),
    "bn_add_relu_backward_input": input_reason,
    "relu_backward": lambda dy, mask: activations_reason(dy),
    "bn_relu_maxpool_forward": lambda c, *rest: activations_reason(c),
    "bn_relu_maxpool_backward_reduce": lambda dy, indices, c, *rest: activations_reason(c, dy),
    "bn_relu_maxpool_backward_input": lambda dy, indices, c, *rest: activations_reason(c, dy),
    "conv_backward_weight": weight_gradient_reason,
    "conv1x1_forward": product_reason,
    "conv_backward_input": input_gradient_reason,
    "conv_bias_add_relu_forward": conv_reason,
}


class NativeOps:
    """`RawOps` in compiled code."""

    name = "native"

    def __init__(self) -> None:
        load()
        self._ops = torch.ops.fusedres_native

    def supports(self, op: str, *args: Any) -> str | None:
        reason = REASONS.get(op)
        return "no_kernel" if reason is None else reason(*args)

    def bn_stats(self, c):
        return self._ops.bn_stats(c)

    def bn_scale_shift(self, mean, var, weight, bias, eps):
        return BatchNormVectors(mean, var, *self._ops.bn_scale_shift(mean, var, weight, bias, eps))

    def bn_add_relu_forward(
        self,
        c,
        scale,
        shift,
        residual=None,
        residual_scale=None,
        residual_shift=None,
        relu=True,
        save_mask=False,
        reuse_c=False,
    ):
        args = c, scale, shift, residual, residual_scale, residual_shift, relu
        if reuse_c and not save_mask and c.device.type == "cpu":
            self._ops.bn_add_relu_forward_(*args)
            return c, None
        return self._ops.bn_add_relu_forward(*args, save_mask)

    def bn_add_relu_backward_reduce(
        self, dy, c, vectors, mask=None, relu=True, shortcut_c=None, shortcut_mean=None
    ):
        v = vectors
        return self._ops.bn_add_relu_backward_reduce(
            dy, c, v.mean, v.scale, v.shift, mask, relu, shortcut_c, shortcut_mean
        )

    def bn_backward_coefficients(self, sum_dz, sum_dz_centered, vectors, rows, training):
        v = vectors
        dweight, B, K = self._ops.bn_backward_coefficients(
            sum_dz, sum_dz_centered, v.mean, v.invstd, v.scale, rows, training
        )
        return BatchNormGrads(dweight, sum_dz, v.scale, B, K)

    def bn_add_relu_backward_input(
        self,
        dy,
        c,
        vectors,
        grads,
        mask=None,
        relu=True,
        shortcut_c=None,
        shortcut_grads=None,
        save_dz=False,
        reuse_dy=False,
        reuse_c=False,
    ):
        v, g = vectors, grads
        if reuse_dy and shortcut_c is None and not save_dz and dy.device.type == "cpu":
            self._ops.bn_add_relu_backward_input_(dy, c, v.scale, v.shift, g.A, g.B, g.K, mask, relu)
            return dy, None
        shortcut = (None, None, None) if shortcut_grads is None else shortcut_grads[2:]
        args = dy, c, v.scale, v.shift, g.A, g.B, g.K, mask, relu, shortcut_c, *shortcut, save_dz
        if reuse_c and c.device.type == "cpu":
            dz = self._ops.bn_add_relu_backward_input_of_c_(*args)
            return c, dz if shortcut_c is None else shortcut_c
        return self._ops.bn_add_relu_backward_input(*args)

    def relu_backward(self, dy, mask):
        return self._ops.relu_backward(dy, mask)

    def bn_relu_maxpool_forward(self, c, scale, shift, kernel_size, stride, padding, save_indices=True):
        return self._ops.bn_relu_maxpool_forward(c, scale, shift, kernel_size, stride, padding, save_indices)

    def bn_relu_maxpool_backward_reduce(self, dy, indices, c, vectors, kernel_size, stride, padding):
        return self._ops.bn_relu_maxpool_backward_reduce(
            dy, indices, c, vectors.mean, kernel_size, stride, padding
        )

    def bn_relu_maxpool_backward_input(self, dy, indices, c, grads, kernel_size, stride, padding):
        return self._ops.bn_relu_maxpool_backward_input(
            dy, indices, c, grads.A, grads.B, grads.K, kernel_size, stride, padding
        )

    def conv1x1_forward(
        self,
        x,
        weight,
        bias=None,
        stride=1,
        in_scale=None,
        in_shift=None,
        scale=None,
        shift=None,
        residual=None,
        residual_scale=None,
        residual_shift=None,
        relu=False,
        save_mask=False,
        save_stats=False,
    ):
        epilogue = scale, shift, residual, residual_scale, residual_shift, relu
        return Conv1x1Output(self._ops.conv1x1_forward(x, weight, *epilogue), None, None, None)

    def conv_backward_weight(self, dy, x, kernel_size, stride, padding, dilation, groups):
        return self._ops.conv_backward_weight(dy, x, *kernel_size, *stride, *padding, *dilation)

    def conv_backward_input(
        self,
        dy,
        x,
        weight,
        stride,
        padding,
        dilation,
        groups,
        shortcut_dy=None,
        shortcut_mask=None,
        reuse_shortcut=False,
    ):
        in_place = shortcut_dy is not None and shortcut_mask is None and reuse_shortcut
        if tuple(stride) == (1, 1) and not in_place:
            return self._ops.conv_backward_input(dy, weight, shortcut_dy, shortcut_mask)
        dx = shortcut_dy if in_place else shortcut_dy.clone()
        self._ops.conv_backward_input_(dx, dy, weight, *stride)
        return dx

    def conv_bias_add_relu_forward(self, x, weight, bias, residual, relu, stride, padding, dilation, groups):
        # oneDNN adds in the convolution's epilogue; its ReLU would turn NaN into 0
        window = padding, stride, dilation, groups
        if residual is None:
            y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
        else:
            y = torch.ops.mkldnn._convolution_pointwise.binary(
                x, residual, weight, bias, *window, "add", 1.0, None, [], ""
            )
        return y.relu_() if relu else y
