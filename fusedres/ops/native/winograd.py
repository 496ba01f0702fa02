"""3x3 convolutions of float32 on a CPU by Winograd's algorithm: which calls, with which tiles.

F(4x4, 3x3) has a quarter of the products of a direct convolution, F(2x2, 3x3) four ninths and less error than one
(csrc/cpu/winograd_tiles.h). A value that is not finite spreads over a tile: then the library computes the call again.

    FUSEDRES_WINOGRAD=0              leaves these convolutions to torch's own
    patch(model, accuracy="strict")  takes F(2x2, 3x3) alone, and sums weight gradients directly
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from fusedres.ops.contract import Conv3x3Forward, ConvBackwardInput, ConvBackwardWeight, ConvOutput
from fusedres.ops.native import kept_memory
from fusedres.ops.reference import REFERENCE

ENVIRONMENT_VARIABLE = "FUSEDRES_WINOGRAD"
LIBRARY = torch.ops.fusedres_native  # empty until the library is loaded

LARGE, SMALL, NONE = 4, 2, 0  # sides of a tile of results; 0: a direct convolution
# against oneDNN 3.12 on two cores of Zen 3, bench/results/cpu/README.md: where a block of 16 channels or more pays
FEWEST_CHANNELS = 16
FEWEST_CHANNELS_BESIDE_WIDER = 32  # where oneDNN's vectors are twice as wide
SHORTEST_SIDE = 4
MANY_CHANNELS = 48  # with fewer the transforms cost more than the products, and most of those must be saved
MOST_PRODUCTS, MOST_PRODUCTS_OF_FEW = 0.6, 0.4  # of those of a direct convolution
LANES = {"avx2": 8, "avx512": 16}  # results are computed in groups of so many channels
# F(4x4, 3x3) has 2 to 3.5 times a direct convolution's error, less from so many summed channels on; over fewer values
# than this, eager's batch statistics are exact enough that a network's whole error would show it
MANY_SUMMED = 256
FEWEST_VALUES = 2**17  # N * C * H * W


def is_on() -> bool:
    return os.environ.get(ENVIRONMENT_VARIABLE) != "0"


def described(strict: bool) -> str:
    """How these convolutions run, in a line. strict: with `accuracy="strict"`."""
    head = "3x3 convolutions of float32 without stride on this CPU:"
    if not is_on():
        return f"{head} torch's own ({ENVIRONMENT_VARIABLE}=0)"
    if strict:
        found = f"{head} Winograd F(2x2, 3x3) and direct weight gradients"
        return f'{found}, accuracy "strict"; {ENVIRONMENT_VARIABLE}=0 leaves them to torch'
    return (
        f"{head} Winograd F(4x4, 3x3), or F(2x2, 3x3) where that has fewer products, and torch's own where those "
        f'are as fast; accuracy "strict" takes F(2x2, 3x3) alone, {ENVIRONMENT_VARIABLE}=0 leaves them to torch'
    )


def products(height: int, width: int, tile: int) -> int:
    """Of an image [height, width] for each pair of channels, with tiles of that side."""
    return -(-height // tile) * -(-width // tile) * (tile + 2) ** 2


def tile_of(image: Tensor, summed: int | None, largest: int) -> int:
    """The side of a tile of results for images [N, C, H, W]: 4 where that has fewer products, else 2.

    summed: channels summed over; None for a weight gradient, which no further layer is computed from, and in
    inference, where BN has no statistics of these rows.
    largest: 4, or 2 for a convolution that has no more error than a direct one.
    """
    n, _, height, width = image.shape
    if summed is not None and summed < MANY_SUMMED and n * summed * height * width < FEWEST_VALUES:
        return SMALL
    return largest if products(height, width, largest) < products(height, width, SMALL) else SMALL


def reason(image: Tensor, channels: int, results: int, tile: int) -> str | None:
    """Why a 3x3 convolution of images like this one is not taken with this tile, or None.

    channels, results: how many channels it is given, and how many it has.
    """
    if not is_on():
        return "winograd_off"
    height, width = image.shape[2:]
    if min(height, width) < SHORTEST_SIDE or min(channels, results) < fewest_channels():
        return "library_as_fast"
    lanes = LANES[instruction_set()]
    computed = products(height, width, tile) * (-(-results // lanes) * lanes)
    most = MOST_PRODUCTS if min(channels, results) >= MANY_CHANNELS else MOST_PRODUCTS_OF_FEW
    return None if computed <= most * 9 * height * width * results else "library_as_fast"


@cache
def fewest_channels() -> int:
    return FEWEST_CHANNELS_BESIDE_WIDER if LIBRARY.cpu_library_is_wider() else FEWEST_CHANNELS


@cache
def instruction_set() -> str:
    return str(LIBRARY.cpu_capability())


def forward_tile(op: Conv3x3Forward, largest: int) -> int:
    """As `tile_of`, for this convolution."""
    return tile_of(op.x, op.x.shape[1] if op.scale is None else None, largest)


def gradient_tile(op: ConvBackwardInput | ConvBackwardWeight, largest: int) -> int:
    """As `tile_of`, for this gradient."""
    return tile_of(op.dy, op.dy.shape[1] if isinstance(op, ConvBackwardInput) else None, largest)


def takes(op: ConvBackwardInput | ConvBackwardWeight, largest: int = LARGE) -> bool:
    """Whether this gradient of a convolution is one of a 3x3 convolution that is taken."""
    if largest == NONE:
        return False
    kernel = op.kernel_size if isinstance(op, ConvBackwardWeight) else op.weight.shape[2:]
    where = tuple(kernel), tuple(op.stride), tuple(op.padding), tuple(op.dilation)
    if where != ((3, 3), (1, 1), (1, 1), (1, 1)) or op.groups != 1 or op.x.dtype != torch.float32:
        return False
    tile = gradient_tile(op, largest)
    return op.x.is_cpu and reason(op.x, op.dy.shape[1], op.x.shape[1], tile) is None


def channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def conv3x3_forward(op: Conv3x3Forward, largest: int = LARGE) -> ConvOutput:
    x, weight, _, in_scale, in_shift, scale, shift, residual, residual_scale, residual_shift, relu, *_ = op
    tile = forward_tile(op, largest)
    vectors = in_scale, in_shift, scale, shift, residual, residual_scale, residual_shift
    args = x, channels_last(weight), *vectors, relu, op.save_stats, tile
    y = kept_memory.take_result(op)
    if y is None:
        y, _, mean, var, finite = LIBRARY.conv3x3_forward(*args)
    else:
        mean, var, finite = LIBRARY.conv3x3_forward_out(*args, y)
    return ConvOutput(y, None, mean, var) if finite else REFERENCE(op)


def conv_backward_input(op: ConvBackwardInput, largest: int) -> Tensor:
    args = op.dy, channels_last(op.weight), op.shortcut_dy, op.shortcut_mask
    dx = kept_memory.take_like(op.x)
    if dx is None:
        dx, _, finite = LIBRARY.conv3x3_backward_input(*args, gradient_tile(op, largest))
    else:
        finite = LIBRARY.conv3x3_backward_input_out(*args, gradient_tile(op, largest), dx)
    return dx if finite else REFERENCE(op)


def conv_backward_weight(op: ConvBackwardWeight, largest: int) -> Tensor:
    dw, finite = LIBRARY.conv3x3_backward_weight(
        op.dy, op.x, op.in_scale, op.in_shift, gradient_tile(op, largest)
    )
    return dw if finite else REFERENCE(op)
