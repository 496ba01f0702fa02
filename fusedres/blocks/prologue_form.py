"""Which blocks have a convolution that can make its own activation: whether recipe `prologue` may run a call."""

from __future__ import annotations

from fusedres.blocks.config import BlockConfig, ConvBNConfig, ConvBNTensors
from fusedres.blocks.gram_form import is_plain_1x1


def unsuitable(config: BlockConfig, units: tuple[ConvBNTensors, ...]) -> str | None:
    """Why no convolution of this block can have the BN and ReLU below it in its prologue, as a reason code, or None."""
    return None if any(in_prologues(config, units)) else "no_plain_convolution"


def in_prologues(config: BlockConfig, units: tuple[ConvBNTensors, ...]) -> tuple[bool, ...]:
    """Of the activations after main[:-1], whether the convolution behind each can make it: from forms alone, whatever
    backend serves."""
    return tuple(
        [
            below.relu and (is_plain_1x1(unit, t) or (t.conv_bias is None and is_plain_3x3(unit, t)))
            for below, unit, t in zip(config.main, config.main[1:], units[1:], strict=False)
        ]
    )


def is_basic(config: BlockConfig, units: tuple[ConvBNTensors, ...]) -> bool:
    """Whether the block ends BN, ReLU, conv3x3, of a form that can have both in its prologue."""
    made, last = in_prologues(config, units), units[len(config.main) - 1]
    return bool(made) and made[-1] and is_plain_3x3(config.main[-1], last)


def is_plain_3x3(unit: ConvBNConfig, t: ConvBNTensors) -> bool:
    """A 3x3 convolution with padding 1, stride 1 or 2, without dilation or groups."""
    return unit.groups == 1 and is_grouped_3x3(unit, t)


def is_grouped_3x3(unit: ConvBNConfig, t: ConvBNTensors) -> bool:
    """The same, with groups or without."""
    square = t.weight.shape[2:] == (3, 3) and unit.padding == (1, 1) and unit.stride in ((1, 1), (2, 2))
    return square and unit.dilation == (1, 1)
