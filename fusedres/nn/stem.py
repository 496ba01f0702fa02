"""The stem of a ResNet over torch's own modules: reads them, runs fused, moves the running statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedres.autograd import ConvBNReLUMaxPool, without_autocast
from fusedres.blocks import stem
from fusedres.blocks.config import output_size
from fusedres.blocks.stem import StemConfig
from fusedres.nn.residual_block import ConvBN, compute_dtype, read_conv_bn
from fusedres.nn.running_stats import BatchStatistics, update_running_stats
from fusedres.opaque_stem import stem_operator
from fusedres.ops.contract import BatchNormVectors
from fusedres.ops.dispatch import AUTO, OpaqueBackend, Ops, operators


def single(value: int | tuple[int, ...]) -> int | None:
    """The one number of a square window's parameter, or None."""
    values = set(value) if isinstance(value, tuple) else {value}
    return values.pop() if len(values) == 1 else None


def unsuitable_pool(pool: nn.MaxPool2d) -> bool:
    """Whether the pooling is outside what `bn_relu_maxpool_forward` serves."""
    window = [single(v) for v in (pool.kernel_size, pool.stride, pool.padding)]
    if None in window or single(pool.dilation) != 1 or pool.ceil_mode or pool.return_indices:
        return True
    return not 1 <= window[0] <= 15  # type: ignore[operator]


def stem_block(x: Tensor, unit: ConvBN, pool: nn.MaxPool2d, *, backend: str | Ops = AUTO) -> Tensor:
    """`maxpool(relu(BN(conv(x))))` with a hand-written backward.

    Args:
        x: [N, Cin, H, W], floating; channels_last is fastest.
        unit: the convolution and its BN, with ReLU.
        pool: a square window of at most 15, without dilation, in floor mode.
        backend: a name of `fusedres.ops.dispatch.backend_names()`, or a dispatcher.

    Returns:
        y [N, Cout, H'', W''], freshly allocated.

    Raises:
        ValueError: a pooling outside of that.
        BackendUnavailableError: unknown backend.
    """
    if unsuitable_pool(pool):
        raise ValueError(f"stem_block: needs a square window of at most 15 without dilation, found {pool}")
    ops = operators(backend) if isinstance(backend, str) else backend
    x = x.to(compute_dtype(x))
    config, tensors = read_conv_bn(unit)
    stem_config = StemConfig(config, *(single(v) for v in (pool.kernel_size, pool.stride, pool.padding)))  # type: ignore[arg-type]

    def move(mean: Tensor, var: Tensor) -> None:
        if config.training:
            kernel = (unit.conv.weight.shape[2], unit.conv.weight.shape[3])
            size = (x.shape[2], x.shape[3])
            h, w = output_size(size, kernel, config.stride, config.padding, config.dilation)
            rows = x.shape[0] * h * w
            update_running_stats([BatchStatistics(unit.bn, mean, var, rows)])

    if isinstance(ops, OpaqueBackend):
        y, statistics = stem_operator(x, stem_config, tensors, ops.name)
        with torch.no_grad():
            move(*statistics)
        return y

    def observe(vectors: tuple[BatchNormVectors, ...]) -> None:
        move(vectors[0].mean, vectors[0].var)

    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        return ConvBNReLUMaxPool.apply(stem_config, ops, observe, x, *tensors)
    with torch.no_grad(), without_autocast(x.device.type):
        y, saved = stem.forward(ops, stem_config, x, tensors, save=False)
        observe((saved.vectors,))
    return y
