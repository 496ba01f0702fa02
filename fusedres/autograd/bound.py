"""What a call that was recorded brings to autograd, and by what its backward runs again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import compress, repeat
from operator import is_not
from typing import Any, NamedTuple

from torch import Tensor

from fusedres.autograd import passes
from fusedres.autograd.passes import Flat
from fusedres.blocks.config import BlockConfig, BlockNeeds, ConvBNNeeds, ConvBNTensors, Layout
from fusedres.ops.dispatch import Dispatcher
from fusedres.recording import replays
from fusedres.recording.bundle import Bundle

FIELDS = len(ConvBNTensors._fields)
PARAMETERS = len(ConvBNNeeds._fields)  # of FIELDS, those that can want a gradient; the rest are statistics
FIXED = 6  # config, recipe, ops, observer, x, residual come before the units' tensors
# places of BN's weight and bias among the arguments, of as many units as any block has
NORMS = frozenset(FIXED + unit * FIELDS + field for unit in range(64) for field in (2, 3))

Places = tuple[tuple[int, int], ...]


@lru_cache(maxsize=256)
def places(given: tuple[bool, ...], residual: bool) -> tuple[Places, Places]:
    """Of the gradients of BN's parameters, which cost nothing, and of all others: as `taken` asks for them.

    given: which of the units' tensors there are; residual: whether one is given.
    """
    tensors = FIXED - 2, *([FIXED - 1] if residual else []), *(i for i, t in enumerate(given, FIXED) if t)
    norms = tuple((node, place) for node, place in enumerate(tensors) if place in NORMS)
    return norms, tuple((node, place) for node, place in enumerate(tensors) if place not in NORMS)


@lru_cache(maxsize=256)
def needs_of(wanted: tuple[bool, ...], saved: bool) -> BlockNeeds:
    """wanted: a flag for each argument of `ResidualBlock`; saved: as in BlockNeeds."""
    units = (ConvBNNeeds(*wanted[i : i + PARAMETERS]) for i in range(FIXED, len(wanted), FIELDS))
    return BlockNeeds(wanted[FIXED - 2], wanted[FIXED - 1], tuple(units), saved)


class BoundBackward:
    """The backward of calls of one kind, by the recordings that have served it.

    Args:
        given: which of the units' tensors there are.
        device: its kind.
    """

    def __init__(
        self,
        recipe: str,
        ops: Dispatcher,
        config: BlockConfig,
        given: tuple[bool, ...],
        layout: Layout,
        device: str,
    ) -> None:
        self._call = recipe, ops, config
        self._given, self._layout = given, layout
        self._device = device
        self.places = places(given, False)
        self._passes: dict[Hashable, replays.Pass] = {}

    def gradients(self, x: Tensor, flat: Flat, saved: Bundle, dy: Tensor, needs: BlockNeeds) -> Flat:
        """As `passes.backward`."""
        key = needs, replays.generation()
        found = self._passes.get(key)
        latest = None if found is None else found.latest
        if found is not None and latest is not None and type(dy) is Tensor:
            inputs: list[Any] = [x, *compress(flat, self._given), dy]
            if replays.are_on_for(self._device):
                is_direct = replays.is_for_kernels(x) and replays.is_for_kernels(dy)
                out = replays.again(found, latest, x, latest.run, inputs, saved, False, is_direct)
                if out is not None:
                    return out
        recipe, ops, config = self._call
        grads = passes.backward(recipe, ops, config, x, flat, saved, self._layout, dy, needs)
        found = replays.look_up(
            passes.backward_key(recipe, ops, config, x, self._layout, needs), (x, *flat, dy), saved
        )
        if found is not None:
            self._passes[key] = found
        return grads


class Made(NamedTuple):
    """What a forward gave that has run already; backward: of calls like it."""

    y: Tensor
    saved: Flat | Bundle
    layout: Layout
    backward: BoundBackward


def given_of(flat: Sequence[Tensor | None]) -> tuple[bool, ...]:
    return tuple(map(is_not, flat, repeat(None)))
