"""Study 2: training and test error against depth. Its networks are those of studies 3 and 4 too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedres.cli.study import networks, training
from fusedres.cli.study.networks import Kind
from fusedres.cli.study.settings import Settings
from fusedres.cli.study.tasks import Context, Task

KINDS = (networks.RESIDUAL, networks.PLAIN, Kind("residual", norm=False), Kind("plain", norm=False))
COMPARED_STEPS = 3  # of the small training, patched and unpatched


def name(kind: Kind, depth: int, seed: int) -> str:
    return f"training-{training.key(kind, depth, seed)}"


def train(context: Context, kind: Kind, depth: int, seed: int) -> dict[str, Any]:
    """The losses of a training and the errors after it; the weights are kept where another study needs them."""
    settings, images = context.settings, context.images
    model = networks.build(kind, depth, images.channels, len(images.classes), seed)
    model = networks.patched(model, kind)
    losses = training.train(model, images, settings, settings.steps, seed)
    networks.check_ran(model, kind)
    model.eval()
    found = {
        "losses": losses,
        "training_error": training.error_rate(model, images.train, images.train_labels),
        "test_error": training.error_rate(model, images.test, images.test_labels),
    }
    if kind.fuses and depth in {*settings.exit_depths, *settings.landscape_depths}:
        context.store.save_weights(name(kind, depth, seed), model.state_dict())
    return found


def trained(context: Context, kind: Kind, depth: int, seed: int) -> nn.Module:
    """A network that `train` trained, patched, in evaluation mode."""
    images = context.images
    model = networks.build(kind, depth, images.channels, len(images.classes), seed)
    model.load_state_dict(context.store.load_weights(name(kind, depth, seed)))
    return networks.patched(model, kind).eval()


def tasks(settings: Settings, kinds: tuple[Kind, ...] = KINDS, depths: tuple[int, ...] = ()) -> list[Task]:
    """The longest first, so that no core waits for one at the end."""
    return [
        Task(name(kind, depth, seed), train, (kind, depth, seed))
        for depth in sorted(depths or settings.depths, reverse=True)
        for kind in kinds
        for seed in settings.seeds
    ]


def small(context: Context, is_patched: bool) -> Tensor:
    """The losses of a few float64 steps of the shallowest networks, and the outputs after them."""
    images, values = context.images, []
    doubled = images._replace(train=images.train.double())
    for kind in (networks.PLAIN, networks.RESIDUAL):
        model = networks.small(images, kind, min(context.settings.depths), is_patched).double()
        losses = training.train(model, doubled, context.settings, COMPARED_STEPS, 0)
        if is_patched:
            networks.check_ran(model, kind)
        outputs = training.outputs(model.eval(), images.test.double())
        values += [torch.tensor(losses, dtype=torch.float64), outputs.flatten()]
    return torch.cat(values)
