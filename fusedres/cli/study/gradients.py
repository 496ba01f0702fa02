"""Study 1: the norms of gradients, block by block, at initialisation and along training.

A block computes y = act(F(x) + x), so with z = F(x) + x its input's gradient is dE/dx = dE/dz + (dF/dx)^T dE/dz: the
first part comes through the shortcut alone, the second through F. Both are computed apart, and their sum is held
against the gradient that the (patched) block itself gave.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres.cli.study import networks, training
from fusedres.cli.study.networks import Kind, blocks
from fusedres.cli.study.tasks import Context, Task
from fusedres.ops.accuracy import relative_error

KINDS = tuple(
    Kind(form, activation, norm)
    for activation in ("relu", "sigmoid")
    for norm in (True, False)
    for form in networks.FORMS
) + tuple(Kind(form, "relu", False, "torch") for form in networks.FORMS)
TRAINED = tuple(
    Kind(form, activation, norm)
    for activation in ("relu", "sigmoid")
    for norm in (True, False)
    for form in ("plain", "residual")
)
SNAPSHOTS = 4  # along a training


class Block:
    """What one block saw in a forward and a backward: x, y and the gradients of both."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.handle = module.register_forward_hook(self.note)

    def note(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        (self.x,), self.y = args, y
        for tensor in (self.x, y):
            tensor.retain_grad()

    def of_sum(self, dy: Tensor, kind: Kind) -> Tensor:
        """dE/dz of the sum z, from dE/dy."""
        if kind.form == "sum":
            return dy
        if kind.activation == "relu":
            return torch.where(self.y <= 0, 0, dy)
        return dy * self.y * (1 - self.y)

    def through_shortcut(self, dz: Tensor) -> Tensor:
        return pulled_back(lambda x: networks.shortcut(self.module, x), self.x, dz)

    def through_main_path(self, dz: Tensor) -> Tensor:
        return pulled_back(lambda x: networks.main_path(self.module, x), self.x, dz)


def pulled_back(function: Any, x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of x where that of function(x) is dy."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x, dy)[0]


def measure(model: nn.Module, kind: Kind, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Norms at one batch, in the model's dtype; the model is changed by it, as by a forward and a backward.

    Returns, block by block from the first:
        inputs: ||dE/dx||; weights: ||dE/dw|| of every convolution in the blocks; last: ||dE/dy|| of the last block.
        shortcut, main: share of dE/dx that arrived so, <part, dE/dx> / ||dE/dx||^2; both sum to 1.
        split_error: ||shortcut's part + F's part - dE/dx|| / ||dE/dx||.
        alone: norm at the block's input of what went through all later shortcuts and through no F.
    """
    seen = [Block(block) for block in blocks(model)]
    try:
        F.cross_entropy(model(images), labels).backward()
    finally:
        for block in seen:
            block.handle.remove()
    convolutions = [m for block in blocks(model) for m in (block.conv1, block.conv2)]
    found: dict[str, Any] = {
        "inputs": [norm(block.x.grad) for block in seen],
        "weights": [norm(convolution.weight.grad) for convolution in convolutions],  # type: ignore[union-attr]
        "last": norm(seen[-1].y.grad),
    }
    if kind.form != "plain":
        found.update(parts(seen, kind))
    return found


def norm(gradient: Any) -> float:
    return gradient.norm().item()


def parts(seen: list[Block], kind: Kind) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in ("shortcut", "main", "split_error", "alone")}
    alone = seen[-1].y.grad
    for block in reversed(seen):
        dx, dy = block.x.grad, block.y.grad
        assert dx is not None and dy is not None and alone is not None
        dz = block.of_sum(dy, kind)
        ways = {"shortcut": block.through_shortcut(dz), "main": block.through_main_path(dz)}
        for name, part in ways.items():
            found[name].append(((part * dx).sum() / (dx * dx).sum()).item())
        found["split_error"].append(relative_error(ways["shortcut"] + ways["main"], dx))
        alone = block.through_shortcut(block.of_sum(alone, kind))
        found["alone"].append(norm(alone))
    return {name: values[::-1] for name, values in found.items()}


def built(context: Context, kind: Kind, depth: int, seed: int) -> nn.Module:
    images = context.images
    return networks.patched(networks.build(kind, depth, images.channels, len(images.classes), seed), kind)


def at_start(context: Context, kind: Kind, depth: int, seed: int) -> dict[str, Any]:
    """In float64: what a float32 could not hold any more still shows."""
    model = built(context, kind, depth, seed).double()
    images, labels = next(training.batches(context.images, context.settings.batch, 1, seed))
    found = measure(model, kind, images.double(), labels)
    networks.check_ran(model, kind)
    return found


def along_training(context: Context, kind: Kind, seed: int) -> dict[str, Any]:
    """Snapshots on one fixed batch while the network trains in float32."""
    settings = context.settings
    model = built(context, kind, settings.gradient_depth, seed)
    images, labels = next(training.batches(context.images, settings.batch, 1, seed))
    steps = sorted({round(i * (settings.gradient_steps - 1) / (SNAPSHOTS - 1)) for i in range(SNAPSHOTS)})
    found = []

    def snapshot(step: int) -> None:
        if step in steps:
            twin = copy.deepcopy(model).double().train()
            twin.zero_grad()
            found.append({"step": step, **measure(twin, kind, images.double(), labels)})

    losses = training.train(model, context.images, settings, settings.gradient_steps, seed, snapshot)
    networks.check_ran(model, kind)
    return {"losses": losses, "snapshots": found}


def name(kind: Kind, depth: int, seed: int, what: str = "start") -> str:
    ending = "-torch" if kind.start == "torch" else ""
    return f"gradients-{what}-{training.key(kind, depth, seed)}{ending}"


def tasks(settings: Any) -> list[Task]:
    starts = [
        Task(name(kind, depth, seed), at_start, (kind, depth, seed))
        for depth in settings.gradient_depths
        for kind in KINDS
        for seed in settings.seeds
    ]
    depth = settings.gradient_depth
    trained = [
        Task(name(kind, depth, seed, "training"), along_training, (kind, seed))
        for kind in TRAINED
        for seed in settings.seeds
    ]
    return [*trained, *starts]


def small(context: Context, is_patched: bool) -> Tensor:
    """Every norm and share of the shallowest residual network and of its plain twin, in float64."""
    depth, seed = min(context.settings.gradient_depths), context.settings.seeds[0]
    images, labels = next(training.batches(context.images, context.settings.batch, 1, seed))
    values: list[float] = []
    for kind in (networks.PLAIN, networks.RESIDUAL):
        model = networks.small(context.images, kind, depth, is_patched).double()
        found = measure(model, kind, images.double(), labels)
        if is_patched:
            networks.check_ran(model, kind)
        for name in ("inputs", "weights", "shortcut", "main", "alone"):
            values += found.get(name, [])
    return torch.tensor(values, dtype=torch.float64)
