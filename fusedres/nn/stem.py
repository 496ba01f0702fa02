"""The stem of a ResNet over torch's own modules: reads them, runs fused, moves the running statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres.autograd.function import ConvBNReLUMaxPool, without_autocast
from fusedres.autograd.stem_operator import stem_operator
from fusedres.blocks import stem
from fusedres.blocks.config import output_size
from fusedres.blocks.stem import StemConfig
from fusedres.nn.numbers import pair
from fusedres.nn.residual_block import ConvBN, compute_dtype, read_conv_bn
from fusedres.nn.running_stats import BatchStatistics, update_running_stats
from fusedres.ops.contract import BatchNormVectors
from fusedres.ops.dispatch import AUTO, OpaqueBackend, Ops, operators


class Window(NamedTuple):
    """A pooling's square window: one number each for height and width."""

    kernel_size: int
    stride: int
    padding: int


def single(value: Any, name: str) -> int | None:
    """The one number of a square window's parameter, or None. Raises UnusualNumberError."""
    height, width = pair(value, name)
    return height if height == width else None


def square_window(pool: nn.MaxPool2d) -> Window | None:
    """The pooling's window; None where it is outside what `bn_relu_maxpool_forward` serves.

    Raises:
        UnusualNumberError: one of its numbers is none that a recipe takes.
    """
    numbers = [single(getattr(pool, name), name) for name in Window._fields]
    # a flag of another type is left to torch
    if pool.ceil_mode is not False or pool.return_indices is not False:
        return None
    if None in numbers or single(pool.dilation, "dilation") != 1:
        return None
    window = Window(*numbers)  # type: ignore[arg-type]
    return window if 1 <= window.kernel_size <= 15 else None


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
        ValueError: a pooling outside of that; a number of a module is a tensor, a string or of another type that no
            recipe takes (UnusualNumberError).
        BackendUnavailableError: unknown backend.
    """
    window = square_window(pool)
    if window is None:
        raise ValueError(f"stem_block: needs a square window of at most 15 without dilation, found {pool}")
    ops = operators(backend) if isinstance(backend, str) else backend
    x = x.to(compute_dtype(x))
    config, tensors = read_conv_bn(unit)
    stem_config = StemConfig(config, *window)

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
