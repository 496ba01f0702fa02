"""A small net with every kind of shortcut and a stem, and what users ask its backward for."""

from __future__ import annotations

import torch
from block_forms import projection, randomize
from same_model import images
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.checkpoint import checkpoint

from fusedres.models import BasicBlock, Bottleneck

Gradients = dict[str, Tensor | None]


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(3, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(torch.relu(self.bn(self.conv(x))))


def net() -> nn.Sequential:
    """A stem, an identity, a pooled shortcut (a tensor to the block), and a projection beside biased convolutions."""
    last = Bottleneck(32, 16, 1, projection(32, 64))
    last.conv2, stem = nn.Conv2d(16, 16, 3, 1, 1), Stem()
    last.bn2.eval(), stem.bn.eval()  # the mean of the batch would take the bias out again
    pooled = nn.Sequential(nn.AvgPool2d(2), *projection(64, 32))
    return randomize(nn.Sequential(stem, Bottleneck(64, 16), BasicBlock(64, 32, 2, pooled), last))


def picture() -> Tensor:
    return images(2, 3, 12, 12).requires_grad_()


def chosen(model: nn.Module, *ends: str) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith(ends)]


def of(*targets):
    """`torch.autograd.grad` of the parameters with these ends of names; "x" is the input."""

    def ask(model: nn.Module) -> Gradients:
        x = picture()
        inputs = [x] if "x" in targets else []
        inputs += chosen(model, *(t for t in targets if t != "x"))
        return dict(enumerate(torch.autograd.grad(model(x).square().sum(), inputs)))

    return ask


def collected(model: nn.Module, x: Tensor) -> Gradients:
    return {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def everything(model: nn.Module) -> Gradients:
    x = picture()
    model(x).square().sum().backward()
    return collected(model, x)


def some_inputs(model: nn.Module) -> Gradients:
    """`backward(inputs=)`, which gives the others None."""
    x = picture()
    model(x).square().sum().backward(inputs=[x, *chosen(model, "2.conv2.weight", "bn3.bias")])
    return collected(model, x)


def intermediate(model: nn.Module) -> Gradients:
    h = model[:2](picture())
    return {"h": torch.autograd.grad(model[2:](h).square().sum(), h)[0]}


def twice(model: nn.Module) -> Gradients:
    """x's alone first, then all of them, by the same graph."""
    x = picture()
    loss = model(x).square().sum()
    (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()
    return {"dx": dx, **collected(model, x)}


def checkpointed(reentrant: bool):
    def ask(model: nn.Module) -> Gradients:
        x = picture()
        h: Tensor = x
        for block in model:
            h = checkpoint(block, h, use_reentrant=reentrant)
        h.square().sum().backward()
        return collected(model, x)

    return ask


def split(model: nn.Module) -> Gradients:
    """As a pipeline does that hands x's gradient on before it computes those of the weights."""
    x = picture()
    loss = model[1:](model[0](x)).square().sum()
    dx, groups = stage_backward_input([loss], None, [x], iter(model.parameters()))
    stage_backward_weight(iter(model.parameters()), groups)
    return {"dx": dx[0], **collected(model, x)}


def hooked(model: nn.Module) -> Gradients:
    """Hooks on tensors and on accumulated gradients run when, and only when, they do unpatched."""
    seen: Gradients = {}
    handles = []
    for name, p in model.named_parameters():
        handles.append(
            p.register_hook(lambda grad, name=name: seen.__setitem__(f"{name} hook", grad.clone()))
        )
        handles.append(
            p.register_post_accumulate_grad_hook(
                lambda p, name=name: seen.__setitem__(f"{name} accumulated", p.grad.clone())
            )
        )
    x = picture()
    loss = model(x).square().sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward(inputs=chosen(model, "weight"))
    for handle in handles:
        handle.remove()
    return {**seen, **collected(model, x)}


def frozen(model: nn.Module) -> Gradients:
    for p in chosen(model, "1.conv1.weight", "1.bn1.weight", "1.bn1.bias", "3.conv2.bias"):
        p.requires_grad_(False)
    x = picture()
    loss = model(x).square().sum()
    loss.backward(inputs=chosen(model, "1.conv2.weight", "3.bn3.weight"))
    return collected(model, x)


ASKED = {
    "x": of("x"),
    "all-parameters": of("weight", "bias"),
    "x-and-parameters": of("x", "weight", "bias"),
    "last-weight": of("3.conv3.weight"),
    "first-norm": of("1.bn1.weight"),
    "some-parameters": of(
        "2.conv2.weight", "2.bn1.bias", "3.conv2.bias", "3.downsample.1.weight", "2.downsample.2.bias"
    ),
    "stem-norm": of("0.bn.bias"),
    "backward": everything,
    "backward-inputs": some_inputs,
    "intermediate": intermediate,
    "twice": twice,
    "checkpoint-reentrant": checkpointed(True),
    "checkpoint": checkpointed(False),
    "hooks": hooked,
    "frozen": frozen,
}
