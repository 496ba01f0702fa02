"""The studies at a tiny size, of networks as they are and of networks that are broken on purpose."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from fusedres.cli.app import app
from fusedres.cli.study import data, main, networks, settings, tasks
from fusedres.cli.study.networks import Kind
from fusedres.cli.study.settings import Settings
from fusedres.models import BasicBlock

TINY = Settings(
    name="tiny",
    seeds=(0, 1),
    depths=(8, 20),
    steps=50,
    gradient_depths=(14,),
    gradient_depth=8,
    gradient_steps=3,
    exit_depths=(20,),
    landscape_depths=(20,),
    grid=9,
    surface_images=64,
    hessian_images=32,
    power_steps=5,
    batch=32,
)


DIRECTIONS = {  # beginnings of the claims that show at this size, in every seed but for CHANCE
    "gradients": (
        "The gradient of a block's input is the sum",
        "In a plain network with sigmoid",
        "Where y = F(x) + x",
        "Shortcuts keep the norm more even",
    ),
    "depth": ("Past some depth a plain network is worse", "With shortcuts a network of that depth trains"),
    "exits": (
        "The best depth differs",
        "More blocks spoil features",
        "A residual block moves",
        "A residual network loses less",
    ),
    "landscape": (
        "Shortcuts make the surface less sharp",
        "Shortcuts make it closer to convex around",
        "Shortcuts make it smoother",
    ),
}
CHANCE = ("Shortcuts make it closer to convex around",)  # shows in 4 of 5 seeds


def few_images() -> data.Images:
    """The digits, 256 to train on and 128 to test."""
    images = data.digits()
    parts = (part[:n] for part, n in zip(images[:4], (256, 256, 128, 128), strict=True))
    return data.Images(*parts, images.classes, images.source)


class Scaled(BasicBlock):
    """y = act(F(x) + x/2), where the block says that it adds x."""

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(networks.main_path(self, x) + networks.shortcut(self, x) / 2)


class ScaledSum(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return networks.main_path(self, x) + networks.shortcut(self, x) / 2


class Cut(BasicBlock):
    """y = act(F(x)): what a network without shortcuts computes, by blocks that say they have them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(networks.main_path(self, x) + 0 * networks.shortcut(self, x))


class CutSum(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return networks.main_path(self, x) + 0 * networks.shortcut(self, x)


Build = Callable[[Kind, int, int, int, int], nn.Module]


def scaled(build: Build) -> Build:
    """Shortcuts that bring half of x."""

    def changed(kind: Kind, *arguments: int) -> nn.Module:
        return with_blocks(build(kind, *arguments), kind, Scaled, ScaledSum)

    return changed


def cut(build: Build) -> Build:
    """Networks with shortcuts that bring nothing: to the last bit their plain twins, whose weights they start with."""

    def changed(kind: Kind, *arguments: int) -> nn.Module:
        model = with_blocks(build(kind, *arguments), kind, Cut, CutSum)
        twin = build(Kind("plain", kind.activation, kind.norm, kind.start), *arguments)
        model.load_state_dict(twin.state_dict(), strict=False)  # which has no projections
        return model

    return changed


def swapped(build: Build) -> Build:
    """Networks without shortcuts where residual ones are asked for, and residual ones for plain."""

    def changed(kind: Kind, *arguments: int) -> nn.Module:
        if kind.form == "plain":
            return build(Kind("residual", kind.activation, kind.norm, kind.start), *arguments)
        return (cut(build) if kind.form == "residual" else build)(kind, *arguments)

    return changed


def with_blocks(
    model: nn.Module, kind: Kind, residual: type[BasicBlock], summed: type[BasicBlock]
) -> nn.Module:
    for block in networks.blocks(model):
        if kind.form != "plain":
            block.__class__ = residual if kind.form == "residual" else summed
    return model


BROKEN = {"cut": cut, "scaled": scaled, "swapped": swapped}


def found(study: str, folder: Path, sizes: Settings = TINY) -> dict[str, Any]:
    """A study's summary, as results.json would hold it."""
    context = tasks.Context(sizes, few_images(), main.Store(folder))
    context.store.open({"settings": sizes.name})
    summaries, _ = main.results(context, [study], 1, lambda *step: None)
    return json.loads(json.dumps(summaries))[study]


def shown(result: dict[str, Any]) -> set[str]:
    """The claims that show in every seed."""
    return {claim["claim"] for claim in result["claims"] if claim["shows"]}


def of_seeds(seeds: tuple[int, ...]) -> Settings:
    return replace(TINY, seeds=seeds)


def use(patching: pytest.MonkeyPatch) -> None:
    """`fusedres study --quick` then has this size, and few digits."""
    images = few_images()
    patching.setattr(settings, "quick", of_seeds)
    patching.setattr(data, "digits", lambda: images)


def study(*arguments: object, **options: Any) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(app, ["study", *map(str, arguments)], **options)


def die(context: object) -> None:
    """A task whose process is ended from outside."""
    os._exit(9)


def picture(file: Path, colour: tuple[int, int, int] = (200, 10, 10)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12), colour).save(file)
