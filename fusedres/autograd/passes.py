"""A block's forward and backward on plain tensors, one after the other in a row: by their recipe, or by a recording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from fusedres.blocks import RECIPES
from fusedres.blocks.config import BlockConfig, BlockNeeds, ConvBNTensors, Layout, Saved
from fusedres.ops.autocast import without_autocast
from fusedres.ops.contract import BatchNormVectors
from fusedres.ops.dispatch import Dispatcher
from fusedres.recording import replays

FIELDS = len(ConvBNTensors._fields)
Flat = Sequence[Tensor | None]
NOTHING: Layout = 0, 0, 0


def as_units(flat: Flat) -> tuple[ConvBNTensors, ...]:
    return tuple(ConvBNTensors(*flat[i : i + FIELDS]) for i in range(0, len(flat), FIELDS))  # type: ignore[arg-type]


class Observer(Protocol):
    """Is told the vectors of every BN before anything is saved for backward, to move running statistics. Later would be
    too late: a checkpoint stops its second forward at the last tensor saved."""

    def __call__(self, vectors: tuple[BatchNormVectors, ...]) -> None: ...

    @property
    def tensors(self) -> list[Tensor | None]:
        """All that it reads and writes."""

    @property
    def constants(self) -> tuple[Any, ...]:
        """All else that it goes by."""


def forward(
    recipe: str,
    ops: Dispatcher,
    config: BlockConfig,
    observer: Observer,
    x: Tensor,
    residual: Tensor | None,
    flat: Flat,
    save: bool,
) -> tuple[Tensor, Flat, Layout]:
    """y; with `save`, what backward needs besides x and `flat`, as `Saved.flatten()`, and its layout.

    flat: the fields of each ConvBNTensors of `config.units`.
    """

    def by_recipe() -> tuple[Flat, Layout]:
        with without_autocast(x.device.type):
            out = RECIPES[recipe].forward(ops, config, x, residual, as_units(flat), save)
            observer(out.vectors)
        if out.saved is None:
            return (out.y,), NOTHING
        return (out.y, *out.saved.flatten()), out.saved.layout

    if replays.are_on(x):
        key = "forward", recipe, ops, config, x.shape, observer.constants, save
        (y, *saved), layout = replays.run(key, (x, residual, *flat, *observer.tensors), by_recipe)
    else:
        (y, *saved), layout = by_recipe()
    assert y is not None
    return y, saved, layout


def backward(
    recipe: str,
    ops: Dispatcher,
    config: BlockConfig,
    tensors: Flat,
    inputs: int,
    layout: Layout,
    dy: Tensor,
    needs: BlockNeeds,
) -> Flat:
    """Gradients of x, of the residual, and of the fields of each unit.

    tensors: x, the units' fields, which are `inputs` many, and what `forward` said that backward needs.
    """
    x = tensors[0]
    assert x is not None

    def by_recipe() -> tuple[Flat, None]:
        units, saved = (
            as_units(tensors[1 : 1 + inputs]),
            Saved.unflatten(tuple(tensors[1 + inputs :]), layout),
        )
        with without_autocast(x.device.type):
            grads = RECIPES[recipe].backward(ops, config, x, units, saved, dy, needs)
        return (grads.x, grads.residual, *(g for unit in grads.units for g in (*unit, None, None))), None

    if not replays.are_on(x):
        return by_recipe()[0]
    return replays.run(("backward", recipe, ops, config, x.shape, layout, needs), (*tensors, dy), by_recipe)[
        0
    ]
