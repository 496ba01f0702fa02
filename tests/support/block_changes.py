"""Changes to a block between two calls, each of which its next call has to go by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from same_model import images
from torch import Tensor, nn

from fusedres.models import Bottleneck

Change = Callable[[Bottleneck], object]


def block() -> Bottleneck:
    torch.manual_seed(0)
    return Bottleneck(16, 4).double()


def resized(module: Bottleneck) -> None:
    """In the same storage, and the same parameter."""
    for conv, bn in ((module.conv1, module.bn1),):
        conv.weight.data = conv.weight.data[:2]
        for t in (bn.weight, bn.bias):
            t.data = t.data[:2]
        bn.running_mean, bn.running_var = bn.running_mean[:2], bn.running_var[:2]
    module.conv2.weight.data = module.conv2.weight.data[:, :2]


def transposed(module: Bottleneck) -> None:
    """The same storage, sizes and dtype, other strides."""
    module.conv2.weight.data = module.conv2.weight.data.transpose(0, 1)


def shared(module: Bottleneck) -> None:
    """One norm's buffer is another's vector: their order counts, and the block is left alone."""
    module.bn2.bias.data = module.bn1.running_mean


def moved(module: Bottleneck) -> None:
    module.conv1.weight.data = module.conv1.weight.data.clone()


def biased(module: Bottleneck) -> None:
    """Before a frozen norm: others take every bias away again."""
    module.bn1.eval()
    module.conv1.bias = nn.Parameter(torch.ones(4, dtype=module.conv1.weight.dtype))


CHANGES: dict[str, Change] = {
    "eps": lambda m: setattr(m.bn2, "eps", 0.5),
    "momentum": lambda m: setattr(m.bn2, "momentum", 0.5),
    "no momentum": lambda m: setattr(m.bn2, "momentum", None),
    "stride": lambda m: setattr(m.conv2, "dilation", (2, 2)) or setattr(m.conv2, "padding", (2, 2)),
    "padding mode": lambda m: setattr(m.conv2, "padding_mode", "circular"),
    "one norm frozen": lambda m: m.bn1.eval(),
    "untracked": lambda m: setattr(m.bn1, "track_running_stats", False),
    "no statistics": lambda m: setattr(m.bn1, "running_mean", None) or setattr(m.bn1, "running_var", None),
    "no bias": lambda m: setattr(m.bn1, "bias", None),
    "another weight": lambda m: setattr(m.conv1, "weight", nn.Parameter(m.conv1.weight.detach() * 2)),
    "another storage": moved,
    "another size": resized,
    "other strides": transposed,
    "shared": shared,
    "a hook": lambda m: m.conv2.register_forward_hook(lambda mod, x, y: y * 2),
    "values": lambda m: m.conv1.weight.data.mul_(2),
    "frozen weight": lambda m: m.conv1.weight.requires_grad_(False),
    "a bias": biased,
}


def step(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    module.zero_grad(set_to_none=True)
    y = module(x)
    y.backward(images(*y.shape, seed=3))
    return y.detach(), {name: p.grad for name, p in module.named_parameters()}
