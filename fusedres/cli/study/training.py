"""Trains one network of a study: SGD with a one-cycle learning rate, the same for every kind and depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres.cli.study.data import Images
from fusedres.cli.study.networks import Kind
from fusedres.cli.study.settings import Settings

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
CHUNK = 512  # images at a time where nothing is trained


def batches(images: Images, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """That many shuffled training batches, epoch after epoch; all of one size, which BN needs."""
    generator = torch.Generator().manual_seed(seed)
    size, done = min(size, len(images.train_labels)), 0
    while True:
        for chosen in torch.randperm(len(images.train_labels), generator=generator).split(size):
            if done == steps:
                return
            if len(chosen) == size:
                yield images.train[chosen], images.train_labels[chosen]
                done += 1


def optimizer_for(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), settings.learning_rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )


def train(
    model: nn.Module,
    images: Images,
    settings: Settings,
    steps: int,
    seed: int,
    before_step: Callable[[int], object] = lambda step: None,
) -> list[float]:
    """The loss of every step, all of them taken even where it is no longer finite."""
    optimizer, losses = optimizer_for(model, settings), []
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps)
    for step, (batch, labels) in enumerate(batches(images, settings.batch, steps, seed)):
        before_step(step)
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(batch.to(next(model.parameters()).dtype)), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def outputs(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a model, or any function of images, gives, a chunk at a time."""
    return torch.cat([forward(chunk) for chunk in images.split(CHUNK)])


def error_rate(forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """The share of the images whose class is not the largest output."""
    return (outputs(forward, images).argmax(1) != labels).double().mean().item()


def key(kind: Kind, depth: int, seed: int) -> str:
    """The name of a training, as the files of a study carry it."""
    return f"{kind.form}-{kind.activation}-{'bn' if kind.norm else 'nobn'}-{depth}-seed{seed}"
