"""A recipe on whole blocks in any dtype, backend and device, held against float64 by the one rule of `accuracy.py`.

Gradients are compared with those of the recipe's own ReLU masks; the yardstick is the block in eager PyTorch, held
against float64 with eager's masks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import masked_blocks
import torch
from accuracy import assert_as_accurate_as_eager
from block_forms import BlockForm, tensors_for
from torch import Tensor, nn

from fusedres.blocks import RECIPES
from fusedres.blocks.config import BlockConfig, BlockNeeds, ConvBNNeeds, ConvBNTensors
from fusedres.nn.residual_block import ConvBN, read_block
from fusedres.ops.dispatch import Dispatcher

PARAMETERS = len(ConvBNNeeds._fields)  # the first fields of ConvBNTensors; statistics follow


def inputs(form: BlockForm, dtype: torch.dtype, device: str = "cpu") -> tuple[nn.Module, Tensor, Tensor]:
    """The block with convolutions in `dtype` and BN in float32, x and dy; more rows than one tile has."""
    block = form.build()
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    x, dy = tensors_for(form, copy.deepcopy(block).float(), torch.float32, batch=8)
    return block.to(device), at_odd_offset(x.to(device, dtype)), dy.to(device, dtype)


def at_odd_offset(x: Tensor) -> Tensor:
    """The same values where no element lies on an even address of its dtype's size."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


def read(block, x: Tensor) -> tuple[BlockConfig, tuple[ConvBNTensors, ...]]:
    names = [n for n in ("1", "2", "3") if hasattr(block, "conv" + n)]
    main = [ConvBN(getattr(block, "conv" + n), getattr(block, "bn" + n), True) for n in names]
    shortcut = None if block.downsample is None else ConvBN(*block.downsample, False)
    call = read_block(x, main, shortcut, shortcut is None)
    return call.config, call.tensors


def leaf(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().clone().requires_grad_()


@dataclass
class Result:
    y: Tensor
    gradients: list[Tensor | None]  # of x, then of each unit's parameters
    masks: masked_blocks.Masks


def by_autograd(config: BlockConfig, x: Tensor, units, dy: Tensor, masks: masked_blocks.Masks | None = None):
    """The block in eager PyTorch, in the dtype of x; what entered each ReLU beside it."""
    x = x.clone().requires_grad_()
    leaves = tuple(ConvBNTensors(*(leaf(t) for t in unit[:PARAMETERS]), *unit[PARAMETERS:]) for unit in units)
    y, found, entered = masked_blocks.forward(config, x, None, leaves, masks)
    wanted = [x, *(t for unit in leaves for t in unit[:PARAMETERS])]
    present = [t for t in wanted if t is not None]
    gradients = iter(torch.autograd.grad(y, present, dy))
    result = Result(y.detach(), [None if t is None else next(gradients) for t in wanted], found)
    return result, entered


def by_recipe(ops: Dispatcher, recipe: str, config: BlockConfig, x: Tensor, units, dy: Tensor) -> Result:
    needs = BlockNeeds(
        True, False, tuple(ConvBNNeeds(*(t is not None for t in unit[:PARAMETERS])) for unit in units)
    )
    with torch.no_grad():
        out = RECIPES[recipe].forward(ops, config, x, None, units, True)
        grads = RECIPES[recipe].backward(ops, config, x, units, out.saved, dy, needs)
        masks = masked_blocks.own_masks(ops, config, out)
    return Result(out.y, [grads.x, *(g for unit in grads.units for g in unit)], masks)


def in_float64(units: tuple[ConvBNTensors, ...]) -> tuple[ConvBNTensors, ...]:
    return tuple(ConvBNTensors(*(None if t is None else t.detach().double() for t in unit)) for unit in units)


def assert_signs_as_sure_as_eager(masks, eager_masks, entered: tuple[Tensor, ...], eps: float) -> None:
    """A sign may differ from float64's where |z| <= 2*(the largest |z| where eager's does) + 8*eps*max|z|."""
    for i, (mask, eager, z) in enumerate(zip(masks, eager_masks, entered, strict=True)):
        size, sign = z.abs(), ~(z <= 0)
        found, own = (size[m != sign].amax().item() if (m != sign).any() else 0.0 for m in (mask, eager))
        limit = 2 * own + 8 * eps * size.max().item()
        assert found <= limit, f"ReLU {i}: a sign differs at |z| = {found:.3e}, more than {limit:.3e}"


def assert_block_as_accurate_as_eager(
    actual: Result, config: BlockConfig, x: Tensor, units: tuple[ConvBNTensors, ...], dy: Tensor
) -> None:
    """`actual`, of `by_recipe` on these arguments, by the rule: signs, y, and every gradient."""
    eager, _ = by_autograd(config, x, units, dy)
    wide = (config, x.double(), in_float64(units), dy.double())
    _, entered = by_autograd(*wide)
    eps = torch.finfo(x.dtype).eps
    assert_signs_as_sure_as_eager(actual.masks, eager.masks, [z.detach() for z in entered], eps)
    exact, _ = by_autograd(*wide, masks=actual.masks)
    exact_of_eager, _ = by_autograd(*wide, masks=eager.masks)
    assert_as_accurate_as_eager(actual.y, eager.y, exact.y, "y")
    largest = max(g.double().norm().item() for g in exact.gradients if g is not None)
    for place, gradients in enumerate(
        zip(actual.gradients, eager.gradients, exact.gradients, exact_of_eager.gradients, strict=True)
    ):
        what = "dx" if place == 0 else f"gradient {place - 1}"
        assert len({g is None for g in gradients}) == 1, what
        if gradients[0] is None:
            continue
        found, plain, exact_gradient, exact_plain = gradients
        if (
            exact_gradient.norm() <= 1e-10 * largest
        ):  # zero in exact arithmetic, as of a bias that BN takes out
            noise, own = (g.double().norm().item() / largest for g in (found, plain))
            assert noise <= 2 * own + 8 * eps, f"{what}: {noise:.3e} of the largest, eager {own:.3e}"
        else:
            # eager's error moves over to the reference of the other masks
            yardstick = (plain.double() - exact_plain + exact_gradient).to(plain.dtype)
            assert_as_accurate_as_eager(found, yardstick, exact_gradient, what)
