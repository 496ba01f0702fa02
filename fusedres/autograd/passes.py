"""A block's forward and backward on plain tensors, one after the other in a row: by their recipe, or by a recording."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from torch import Tensor

from fusedres.blocks import RECIPES
from fusedres.blocks.config import BlockConfig, BlockNeeds, ConvBNTensors, Layout, Saved
from fusedres.ops.autocast import without_autocast
from fusedres.ops.contract import BatchNormVectors
from fusedres.ops.dispatch import Dispatcher
from fusedres.recording import replays
from fusedres.recording.bundle import Bundle

FIELDS = len(ConvBNTensors._fields)
Flat = Sequence[Tensor | None]
NOTHING: Layout = 0, 0, 0


def as_units(flat: Flat) -> tuple[ConvBNTensors, ...]:
    return tuple(ConvBNTensors(*flat[i : i + FIELDS]) for i in range(0, len(flat), FIELDS))  # type: ignore[arg-type]


class Observer(Protocol):
    """Is told the vectors of every BN before anything is saved for backward, to move running statistics. Later would be
    too late: a checkpoint stops its second forward at the last tensor saved.

    tensors: all that it reads and writes; constants: all else that it goes by.
    """

    tensors: list[Tensor | None]
    constants: tuple[Any, ...]

    def __call__(self, vectors: tuple[BatchNormVectors, ...]) -> None: ...


def forward_key(
    recipe: str, ops: Dispatcher, config: BlockConfig, constants: tuple[Any, ...], x: Tensor, save: bool
) -> Hashable:
    """constants: of the observer."""
    return "forward", recipe, ops, config, x.shape, constants, save


def forward_pass(
    recipe: str,
    ops: Dispatcher,
    config: BlockConfig,
    observer: Observer,
    x: Tensor,
    flat: Flat,
    save: bool,
) -> replays.Pass | None:
    """What is known of the pass of such a `forward`, without a residual; None: nothing."""
    key = forward_key(recipe, ops, config, observer.constants, x, save)
    return replays.look_up(key, (x, None, *flat, *observer.tensors))


def backward_key(
    recipe: str, ops: Dispatcher, config: BlockConfig, x: Tensor, layout: Layout, needs: BlockNeeds
) -> Hashable:
    return "backward", recipe, ops, config, x.shape, layout, needs


def saved_of(results: Sequence[Any]) -> Flat | Bundle:
    """results: of a pass, behind y."""
    return results[0] if results and isinstance(results[0], Bundle) else results


def forward(
    recipe: str,
    ops: Dispatcher,
    config: BlockConfig,
    observer: Observer,
    x: Tensor,
    residual: Tensor | None,
    flat: Flat,
    save: bool,
    keeps: bool = False,
) -> tuple[Tensor, Flat | Bundle, Layout]:
    """y; with `save`, what backward needs besides x and `flat`, as `Saved.flatten()`, and its layout.

    flat: the fields of each ConvBNTensors of `config.units`; keeps: what backward needs may stay with a recording.
    """

    def by_recipe() -> tuple[Flat, Layout]:
        with without_autocast(x.device.type):
            out = RECIPES[recipe].forward(ops, config, x, residual, as_units(flat), save)
            observer(out.vectors)
        if out.saved is None:
            return (out.y,), NOTHING
        return (out.y, *out.saved.flatten()), out.saved.layout

    if replays.are_on(x):
        key = forward_key(recipe, ops, config, observer.constants, x, save)
        given = x, residual, *flat, *observer.tensors
        (y, *saved), layout = replays.run(key, given, by_recipe, keeps=keeps)
    else:
        (y, *saved), layout = by_recipe()
    assert y is not None
    return y, saved_of(saved), layout


def backward(
    recipe: str,
    ops: Dispatcher,
    config: BlockConfig,
    x: Tensor,
    flat: Flat,
    saved: Flat | Bundle,
    layout: Layout,
    dy: Tensor,
    needs: BlockNeeds,
) -> Flat:
    """Gradients of x, of the residual, and of the fields of each unit; saved: what `forward` said that it needs."""

    def by_recipe() -> tuple[Flat, None]:
        kept = Saved.unflatten(tuple(tensors_of(saved)), layout)
        with without_autocast(x.device.type):
            grads = RECIPES[recipe].backward(ops, config, x, as_units(flat), kept, dy, needs)
        return (grads.x, grads.residual, *(g for unit in grads.units for g in (*unit, None, None))), None

    if not replays.are_on(x):
        return by_recipe()[0]
    key = backward_key(recipe, ops, config, x, layout, needs)
    if isinstance(saved, Bundle):
        return replays.run(key, (x, *flat, dy), by_recipe, bundle=saved)[0]
    return replays.run(key, (x, *flat, dy, *saved), by_recipe)[0]


def tensors_of(saved: Flat | Bundle) -> Flat:
    return saved.tensors() if isinstance(saved, Bundle) else saved
