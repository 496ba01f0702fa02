"""A recipe as it is called: its module's two functions, on weights in the dtype of the activations.

The weights of a block are cast together as its forward begins, kept for its backward as autocast keeps them, and the
gradients of the weights are cast together as its backward ends: one launch each on a GPU.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fusedres.blocks import prologue_form
from fusedres.blocks.config import (
    BlockConfig,
    BlockGrads,
    BlockNeeds,
    BlockOutput,
    ConvBNGrads,
    ConvBNTensors,
    Saved,
)
from fusedres.blocks.conv_bn_backward import like_parameter
from fusedres.ops.dispatch import Dispatcher
from fusedres.ops.native import casts

Units = tuple[ConvBNTensors, ...]


class Recipe:
    """The pair of functions of a recipe.

    Args:
        module: its KEEPS_ACTIVATIONS says whether it stores any, MAKES_ACTIVATIONS whether backward can do without
            those of `prologue_form.in_prologues`; its `forward` and `backward` take units whose weights are of the
            activations' dtype, and leave gradients of weights in any dtype and shape of as many elements.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.KEEPS_ACTIVATIONS: bool = module.KEEPS_ACTIVATIONS
        self._makes_activations: bool = module.MAKES_ACTIVATIONS

    def kept_activations(
        self, config: BlockConfig, units: Units, stored: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Those of the stored ones that backward has to be given, as backward makes others again.

        It depends on the block's form alone, where what is stored depends on who serves.
        """
        if not self._makes_activations:
            return stored
        made = prologue_form.in_prologues(config, units)
        return tuple([None if again else a for a, again in zip(stored, made, strict=False)])

    def forward(
        self,
        ops: Dispatcher,
        config: BlockConfig,
        x: Tensor,
        residual: Tensor | None,
        units: Units,
        save: bool,
    ) -> BlockOutput:
        """y [N, Cout, H', W'] from x [N, Cin, H, W]; residual like y with Shortcut.TENSOR, else None."""
        weights = casts.cast([t.weight for t in units], x.dtype)
        out: BlockOutput = self._module.forward(ops, config, x, residual, with_weights(units, weights), save)
        if out.saved is None:
            return out
        kept = tuple([None if w is t.weight else w for w, t in zip(weights, units, strict=True)])
        return out._replace(saved=out.saved._replace(weights=kept))

    def backward(
        self,
        ops: Dispatcher,
        config: BlockConfig,
        x: Tensor,
        units: Units,
        saved: Saved,
        dy: Tensor,
        needs: BlockNeeds,
    ) -> BlockGrads:
        """Gradients of everything that `needs` names, from dy like y."""
        kept = saved.weights or (None,) * len(units)
        weights = casts.cast(
            [t.weight if w is None else w for w, t in zip(kept, units, strict=True)], x.dtype
        )
        grads: BlockGrads = self._module.backward(
            ops, config, x, with_weights(units, weights), saved, dy, needs
        )
        return grads._replace(units=like_weights(grads, units))


def with_weights(units: Units, weights: list[Tensor]) -> Units:
    return tuple([t if t.weight is w else t._replace(weight=w) for t, w in zip(units, weights, strict=True)])


def like_weights(grads: BlockGrads, units: Units) -> tuple[ConvBNGrads, ...]:
    """The gradients, those of weights in their weights' dtypes and strides."""
    found = [g.weight for g in grads.units]
    shaped = [None if g is None else shaped_as(g, t.weight) for g, t in zip(found, units, strict=True)]
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, (g, t) in enumerate(zip(shaped, units, strict=True)):
        if g is not None and g.dtype is not t.weight.dtype and g.stride() == t.weight.stride():
            by_dtype.setdefault(t.weight.dtype, []).append(i)
    for dtype, places in by_dtype.items():
        for i, g in zip(places, casts.cast([shaped[i] for i in places], dtype), strict=True):  # type: ignore[misc]
            shaped[i] = g
    return tuple(
        [
            g if w is None else g._replace(weight=like_parameter(w, t.weight))
            for g, w, t in zip(grads.units, shaped, units, strict=True)
        ]
    )


def shaped_as(grad: Tensor, weight: Tensor) -> Tensor:
    return grad if grad.shape == weight.shape else grad.view(weight.shape)
