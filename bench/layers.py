"""The layer table of a ResNet: every convolution's shapes, read off a model on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

# the four stages of a ResNet for 224 x 224 images: width of a block, height and width of its maps
STAGE_WIDTHS = (64, 128, 256, 512)
STAGE_SIDES = (56, 28, 14, 7)


@dataclass(frozen=True)
class Conv:
    """One convolution of one image: [cin, h_in, w_in] -> [cout, h, w]."""

    name: str
    cin: int
    cout: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    groups: int
    h_in: int
    w_in: int
    h: int
    w: int

    @property
    def weights(self) -> int:
        return self.cout * self.cin // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def pointwise(self) -> bool:
        return self.kernel == (1, 1)

    @property
    def strided(self) -> bool:
        return self.stride != (1, 1)


@dataclass(frozen=True)
class Block:
    """One residual block: its main convolutions in order, and the projection of its shortcut, if any."""

    name: str
    main: tuple[Conv, ...]
    projection: Conv | None

    @property
    def has_expansion(self) -> bool:
        """Whether the last convolution is a 1x1 that at least doubles the channels: what `gram` needs."""
        last = self.main[-1]
        return len(self.main) > 2 and last.pointwise and last.cout >= 2 * last.cin


@dataclass(frozen=True)
class Network:
    name: str
    stem: Conv
    pooled: int  # elements of an image behind the stem's pooling; without pooling, of the stem itself
    blocks: tuple[Block, ...]
    features: int
    classes: int
    parameters: int

    @property
    def convs(self) -> list[Conv]:
        inside = [c for b in self.blocks for c in (*b.main, b.projection) if c is not None]
        return [self.stem, *inside]


def read_network(name: str, model: nn.Module, image: tuple[int, int, int]) -> Network:
    """The table of `model` for images [C, H, W]. A block is a non-root module with convolutions of its own.

    Raises:
        ValueError: the model has no convolution outside a block, or no block.
    """
    model = model.to("meta")
    convs: dict[str, Conv] = {}
    pooled: list[int] = []

    def record(module_name):
        def hook(module, inputs, output):
            if isinstance(module, nn.MaxPool2d):
                pooled.append(output[0].numel())
                return
            (x,) = inputs
            convs[module_name] = Conv(
                module_name,
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                module.stride,
                module.groups,
                *x.shape[2:],
                *output.shape[2:],
            )

        return hook

    modules = dict(model.named_modules())
    watched = [(n, m) for n, m in modules.items() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))]
    handles = [m.register_forward_hook(record(n)) for n, m in watched]
    model(torch.empty(1, *image, device="meta"))
    for handle in handles:
        handle.remove()

    blocks: dict[str, list[Conv]] = {}
    stem = None
    for conv_name, conv in convs.items():
        owner = block_of(conv_name, modules)
        if owner is None:
            stem = conv
        else:
            blocks.setdefault(owner, []).append(conv)
    if stem is None or not blocks:
        raise ValueError(f"read_network: {name} has {len(blocks)} blocks and {stem=}; a ResNet has both")
    linear = next(m for m in modules.values() if isinstance(m, nn.Linear))
    return Network(
        name,
        stem,
        pooled[0] if pooled else stem.cout * stem.h * stem.w,
        tuple(as_block(owner, members) for owner, members in blocks.items()),
        linear.in_features,
        linear.out_features,
        sum(p.numel() for p in model.parameters()),
    )


def block_of(conv_name: str, modules: dict[str, nn.Module]) -> str | None:
    """The residual block that holds this convolution: the outermost non-root module with a Conv2d child."""
    parts = conv_name.split(".")[:-1]
    for depth in range(1, len(parts) + 1):
        owner = ".".join(parts[:depth])
        if any(isinstance(child, nn.Conv2d) for child in modules[owner].children()):
            return owner
    return None


def as_block(owner: str, members: list[Conv]) -> Block:
    depth = owner.count(".") + 1
    main = tuple(c for c in members if c.name.count(".") == depth)
    other = [c for c in members if c.name.count(".") > depth]
    return Block(owner, main, other[0] if other else None)
