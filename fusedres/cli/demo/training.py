"""Trains one small ResNet on the digits; everything but the model's patching and the thread count stays the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres.cli.demo.data import Digits
from fusedres.patching.api import patched_blocks

BATCH = 64
LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


@dataclass
class Run:
    """One training run: the loss of every step, and accuracy on the test images in [0, 1]."""

    label: str
    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0


@contextmanager
def threads(count: int) -> Iterator[None]:
    """That many threads inside torch's operations, within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches(digits: Digits, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled training batches, the same for every run of one seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(digits.train_labels), generator=generator)
        for chosen in order.split(BATCH):
            if len(chosen) == BATCH:
                images = digits.train_images[chosen].to(memory_format=torch.channels_last)
                yield images, digits.train_labels[chosen]


def steps_per_epoch(digits: Digits) -> int:
    return len(digits.train_labels) // BATCH


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def train(
    label: str,
    model: nn.Module,
    digits: Digits,
    epochs: int,
    seed: int,
    after_step: Callable[[int, int], object],
) -> Run:
    """Trains by SGD with a one-cycle learning rate; after every step says how many are over, out of how many."""
    run, optimizer = Run(label), optimizer_for(model)
    total = epochs * steps_per_epoch(digits)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=total)
    model.train()
    for images, labels in batches(digits, epochs, seed):
        run.losses.append(step(model, optimizer, images, labels))
        schedule.step()
        after_step(len(run.losses), total)
    run.accuracy = accuracy(model, digits)
    return run


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Share of the test images that are classified right."""
    model.eval()
    predicted = model(digits.test_images.to(memory_format=torch.channels_last)).argmax(1)
    return (predicted == digits.test_labels).double().mean().item()


def fused_blocks(model: nn.Module, images: Tensor) -> int:
    """How many patched blocks run fused, by the type of the autograd node that their output carries.

    A model's stem counts as one: its method is called by itself.
    """
    kinds: list[str] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        kinds.append(type(output.grad_fn).__name__)

    blocks = [block for _, block in patched_blocks(model)]
    handles = [block.register_forward_hook(note) for block in blocks if block is not model]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    if model in blocks:
        kinds.append(type(model.stem(images).grad_fn).__name__)  # type: ignore[operator]
    return kinds.count("ResidualBlockBackward")


def float64_distance(plain: nn.Module, patched: nn.Module, digits: Digits, steps: int, seed: int) -> float:
    """The largest |loss - loss| over that many float64 training steps of the two models from equal weights."""
    pairs = [(model.double().train(), optimizer_for(model)) for model in (plain, patched)]
    worst = 0.0
    for _, (images, labels) in zip(range(steps), batches(digits, 1 + steps, seed), strict=False):
        first, second = (step(model, opt, images.double(), labels) for model, opt in pairs)
        worst = max(worst, abs(first - second))
    return worst
