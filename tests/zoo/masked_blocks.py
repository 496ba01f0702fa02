"""The block in torch's differentiable operations with the signs of its ReLUs given: what gradients are held against.

A sign near zero that rounding flips changes a gradient by far more than any rounding error. So the gradients of an
implementation are judged against float64 with the implementation's *own* masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedres.blocks.config import BlockConfig, BlockOutput, ConvBNConfig, ConvBNTensors, Shortcut
from fusedres.blocks.eager import conv_bn
from fusedres.ops.contract import BnAddReluForward
from fusedres.ops.dispatch import Dispatcher
from fusedres.ops.reference import unpack_mask

Masks = tuple[
    Tensor | None, ...
]  # bool, one for each unit of `config.main`; None: as the values themselves say


@dataclass(frozen=True)
class Network:
    """Blocks in a row: their units, masks and tensors are those of the blocks, one after the other."""

    blocks: tuple[BlockConfig, ...]

    @property
    def main(self) -> tuple[ConvBNConfig, ...]:
        return tuple(unit for block in self.blocks for unit in block.main)

    def of_blocks(
        self, units: tuple[ConvBNTensors, ...]
    ) -> Iterator[tuple[BlockConfig, tuple[ConvBNTensors, ...]]]:
        """Each block with its units."""
        for block in self.blocks:
            yield block, units[: len(block.units)]
            units = units[len(block.units) :]


def forward(
    config: BlockConfig | Network,
    x: Tensor,
    residual: Tensor | None,
    units: tuple[ConvBNTensors, ...],
    masks: Masks | None = None,
) -> tuple[Tensor, Masks, tuple[Tensor, ...]]:
    """y [N, Cout, H', W'] in x's dtype, the masks, and what enters each ReLU; differentiable in everything.

    Without `masks` this is the block as eager PyTorch runs it.
    """
    if isinstance(config, Network):
        return forward_network(config, x, units, masks)
    last = len(config.main) - 1
    found, entered = [], []
    a = x
    for i, unit in enumerate(config.main):
        z = conv_bn(a, unit, units[i])
        if i == last:
            z = join(config, z, x, residual, units)
        mask = None if masks is None else masks[i]
        if unit.relu:
            mask = ~(z.detach() <= 0) if mask is None else mask
            a = torch.where(mask, z, 0)
        else:
            a = z
        found.append(mask if unit.relu else None)
        entered.append(z)
    return a, tuple(found), tuple(entered)


def forward_network(
    network: Network, x: Tensor, units: tuple[ConvBNTensors, ...], masks: Masks | None
) -> tuple[Tensor, Masks, tuple[Tensor, ...]]:
    found, entered = (), ()
    for block, of_block in network.of_blocks(units):
        given = None if masks is None else masks[len(found) : len(found) + len(block.main)]
        x, *more = forward(block, x, None, of_block, given)
        found, entered = found + more[0], entered + more[1]
    return x, found, entered


def join(
    config: BlockConfig, z: Tensor, x: Tensor, residual: Tensor | None, units: tuple[ConvBNTensors, ...]
) -> Tensor:
    """z with the shortcut added."""
    if config.projection is not None:
        return z + conv_bn(x, config.projection, units[-1])
    if config.shortcut is Shortcut.IDENTITY:
        return z + x
    return z if residual is None else z + residual


def own_masks(ops: Dispatcher, config: BlockConfig, out: BlockOutput) -> Masks:
    """The masks that a recipe's backward uses, from what its forward saved (what it did not store is made again)."""
    assert out.saved is not None
    last = len(config.main) - 1
    found: list[Tensor | None] = []
    for i, unit in enumerate(config.main[:last]):
        c, v = out.saved.convs[i], out.vectors[i]
        activation = out.saved.activations[i] if out.saved.activations else None
        if activation is None:
            activation, _ = ops(BnAddReluForward(c, v.scale, v.shift, relu=unit.relu))
        found.append(~(activation <= 0) if unit.relu else None)
    mask = out.saved.mask
    return (*found, None if mask is None else unpack_mask(mask, out.y))
