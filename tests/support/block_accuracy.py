"""A recipe on whole blocks in any dtype, backend and device, held against float64 by the one rule of `accuracy.py`.

Gradients are compared with those of the recipe's own ReLU masks; the yardstick is the block in eager PyTorch, held
against float64 with eager's masks, both over several draws of x and dy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import masked_blocks
import torch
from block_forms import BlockForm, tensors_for
from masked_blocks import Network
from torch import Tensor, nn

from fusedres.blocks import RECIPES
from fusedres.blocks.config import BlockConfig, BlockNeeds, ConvBNNeeds, ConvBNTensors
from fusedres.nn.residual_block import ConvBN, read_block
from fusedres.ops.accuracy import error_limit
from fusedres.ops.dispatch import Dispatcher

PARAMETERS = len(ConvBNNeeds._fields)  # the first fields of ConvBNTensors; statistics follow
DRAWS = 8  # of x and dy


def inputs(
    form: BlockForm, dtype: torch.dtype, device: str = "cpu", seed: int = 1
) -> tuple[nn.Module, Tensor, Tensor]:
    """The block with convolutions in `dtype` and BN in float32, x and dy; more rows than one tile has."""
    block = form.build()
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    x, dy = tensors_for(form, copy.deepcopy(block).float(), torch.float32, 8, seed)
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


def by_autograd(
    config: BlockConfig | Network, x: Tensor, units, dy: Tensor, masks: masked_blocks.Masks | None = None
):
    """The block, or a network, in eager PyTorch, in the dtype of x; what entered each ReLU beside it."""
    x = x.clone().requires_grad_()
    leaves = tuple(ConvBNTensors(*(leaf(t) for t in unit[:PARAMETERS]), *unit[PARAMETERS:]) for unit in units)
    y, found, entered = masked_blocks.forward(config, x, None, leaves, masks)
    wanted = [x, *(t for unit in leaves for t in unit[:PARAMETERS])]
    present = [t for t in wanted if t is not None]
    gradients = iter(torch.autograd.grad(y, present, dy))
    result = Result(y.detach(), [None if t is None else next(gradients) for t in wanted], found)
    return result, entered


def needs_of(units: tuple[ConvBNTensors, ...]) -> BlockNeeds:
    """Every gradient."""
    return BlockNeeds(
        True, False, tuple(ConvBNNeeds(*(t is not None for t in unit[:PARAMETERS])) for unit in units)
    )


def by_recipe(ops: Dispatcher, recipe: str, config: BlockConfig, x: Tensor, units, dy: Tensor) -> Result:
    needs = needs_of(units)
    with torch.no_grad():
        out = RECIPES[recipe].forward(ops, config, x, None, units, True)
        grads = RECIPES[recipe].backward(ops, config, x, units, out.saved, dy, needs)
        masks = masked_blocks.own_masks(ops, config, out)
    return Result(out.y, [grads.x, *(g for unit in grads.units for g in unit)], masks)


def network_by_recipe(ops: Dispatcher, recipe: str, network: Network, x: Tensor, units, dy: Tensor) -> Result:
    """Each block by the recipe: all forwards, then all backwards."""
    calls, y, masks = [], x, ()
    gradients: list[Tensor | None] = []
    with torch.no_grad():
        for config, of_block in network.of_blocks(units):
            out = RECIPES[recipe].forward(ops, config, y, None, of_block, True)
            masks += masked_blocks.own_masks(ops, config, out)
            calls.append((config, y, of_block, out.saved))
            y = out.y
        for call in reversed(calls):
            grads = RECIPES[recipe].backward(ops, *call, dy, needs_of(call[2]))
            gradients[:0] = (g for unit in grads.units for g in unit)
            dy = grads.x
    return Result(y, [dy, *gradients], masks)


def in_float64(units: tuple[ConvBNTensors, ...]) -> tuple[ConvBNTensors, ...]:
    return tuple(ConvBNTensors(*(None if t is None else t.detach().double() for t in unit)) for unit in units)


def largest_flipped(mask: Tensor | None, z: Tensor) -> float:
    """The largest |z| whose sign is not that of the mask, over the largest of all; both [N, C, H, W]."""
    if mask is None:
        return 0.0
    size = z.abs()
    wrong = size[mask == (z <= 0)]
    return wrong.max().item() / size.max().item() if wrong.numel() else 0.0


Run = Callable[[Any, Tensor, tuple[ConvBNTensors, ...], Tensor], Result]


def tensors_of(result: Result) -> list[Tensor | None]:
    return [result.y, *result.gradients]


class Errors(NamedTuple):
    """Of one result against float64: of the signs of every ReLU, and ||result - exact|| of y and of every gradient."""

    signs: list[float]
    tensors: list[float]  # 0 for a gradient that nobody wants

    def relative(self, exact: Result) -> list[float]:
        """All in one list: the second over the norm of the tensor, or over that of the largest gradient for one that
        is zero in exact arithmetic, as of a bias that BN takes out."""
        norms = [0.0 if t is None else t.norm().item() for t in tensors_of(exact)]
        largest = max(norms[1:])
        norms[1:] = [norm if norm > 1e-10 * largest else largest for norm in norms[1:]]
        return [*self.signs, *(error / norm for error, norm in zip(self.tensors, norms, strict=True))]


def errors_of(
    result: Result, config: BlockConfig | Network, x: Tensor, units: tuple[ConvBNTensors, ...], dy: Tensor
) -> tuple[Errors, Result]:
    """The errors, and what they are against: float64 with the result's own masks."""
    wide = config, x.double(), in_float64(units), dy.double()
    _, entered = by_autograd(*wide)
    signs = [largest_flipped(mask, z.detach()) for mask, z in zip(result.masks, entered, strict=True)]
    exact, _ = by_autograd(*wide, masks=result.masks)
    tensors = []
    for found, right in zip(tensors_of(result), tensors_of(exact), strict=True):
        tensors.append(0.0 if found is None or right is None else (found.double() - right).norm().item())
    return Errors(signs, tensors), exact


def draws(x: Tensor, dy: Tensor, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    """x and dy, and more of the kind that `block_forms.tensors_for` makes: `number` in all."""
    yield x, dy
    generator = torch.Generator().manual_seed(0)
    for _ in range(number - 1):
        again = torch.randn(x.shape, generator=generator)
        gradient = torch.randn(dy.shape, generator=generator) + dy.double().mean().item()
        yield torch.empty_like(x).copy_(again), torch.empty_like(dy).copy_(gradient)


def eagerly(config: BlockConfig | Network, x: Tensor, units: tuple[ConvBNTensors, ...], dy: Tensor) -> Result:
    return by_autograd(config, x, units, dy)[0]


def errors_over_draws(
    run: Run,
    config: BlockConfig | Network,
    x: Tensor,
    units: tuple[ConvBNTensors, ...],
    dy: Tensor,
    number: int,
) -> Errors:
    """The largest over draws of the signs' errors, the root mean square of the others, of what `run` gives.

    A gradient of eight channels has eight errors, each a sum of roundings: in a single draw these are now and then a
    third, or twice, of what they mostly are, and a ReLU has one sign or none that differs.
    """
    found = []
    for drawn, gradient in draws(x, dy, number):
        call = config, drawn, units, gradient
        found.append(errors_of(run(*call), *call)[0])
    signs = [max(errors) for errors in zip(*(errors.signs for errors in found), strict=True)]
    squares = torch.tensor([errors.tensors for errors in found], dtype=torch.float64).square()
    return Errors(signs, squares.mean(0).sqrt().tolist())


def compared(config: BlockConfig | Network, result: Result) -> list[str]:
    """What each of `Errors.relative` is of."""
    signs = [f"signs of ReLU {i}" for i in range(len(config.main))]
    return [*signs, "y", "dx", *(f"gradient {i}" for i in range(len(result.gradients) - 1))]


def assert_block_as_accurate_as_eager(
    run: Run,
    config: BlockConfig | Network,
    x: Tensor,
    units: tuple[ConvBNTensors, ...],
    dy: Tensor,
    number: int = DRAWS,
    of_eager: int = DRAWS,
) -> None:
    """What `run` gives on these arguments and on others like them, `number` in all, by the rule: signs, y and every
    gradient. Eager's error is that of `of_eager` draws: where few signs differ at all, the largest is of few."""
    call = config, x, units, dy
    actual, eager = run(*call), eagerly(*call)
    dtypes = [[None if t is None else t.dtype for t in tensors_of(result)] for result in (actual, eager)]
    assert dtypes[0] == dtypes[1], f"dtypes {dtypes[0]}, eager {dtypes[1]}"
    _, exact = errors_of(actual, *call)
    found = errors_over_draws(run, *call, number).relative(exact)
    own = errors_over_draws(eagerly, *call, of_eager).relative(exact)
    for what, error, yardstick in zip(compared(config, actual), found, own, strict=True):
        limit = error_limit(yardstick, x.dtype)
        assert error <= limit, f"{what}: error {error:.3e} exceeds {limit:.3e} (eager's own: {yardstick:.3e})"
