"""What the patcher knows of one block: names and plain values only, so that it survives deepcopy and pickle.

Modules are found by name in every call; nothing here refers to one.
"""

from __future__ import annotations

from typing import NamedTuple

from fusedres.blocks.config import Shortcut

STATE = "_fusedres"  # the attribute of a patched block that holds its plan
BASE = "__fusedres_base__"  # the attribute of a patched class that holds the class it was made from
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation, groups


class ConvBNNames(NamedTuple):
    """Paths of a convolution and its BN inside the block, whether a ReLU follows, and the geometry found."""

    conv: str
    bn: str
    relu: bool
    geometry: Geometry


class Submodule(NamedTuple):
    """One module of a block as found: its path, its class, its children's names in order, its own attributes."""

    path: str
    cls: type
    children: tuple[str, ...]
    attributes: tuple[tuple[str, object], ...]


class BlockPlan(NamedTuple):
    """One matched block.

    shortcut_path: the submodule to call for Shortcut.TENSOR; structure: the block and every module below it, as
    found.
    """

    main: tuple[ConvBNNames, ...]
    shortcut: Shortcut
    projection: ConvBNNames | None
    shortcut_path: str | None
    structure: tuple[Submodule, ...]

    @property
    def method(self) -> str:
        """The method of the class that is replaced."""
        return "forward"

    @property
    def units(self) -> tuple[ConvBNNames, ...]:
        return self.main if self.projection is None else (*self.main, self.projection)

    @property
    def form(self) -> str:
        """A short description, for the report: kernel count and shortcut."""
        return f"{len(self.main)} conv-bn, {self.shortcut.value} shortcut"


class StemPlan(NamedTuple):
    """A model's stem: the method that computes it, its convolution and BN, its pooling if it has one.

    structure: paths and classes of the submodules that the method calls, as found.
    """

    method: str
    unit: ConvBNNames
    pool: str | None
    structure: tuple[tuple[str, type], ...]

    @property
    def shortcut(self) -> Shortcut:
        return Shortcut.NONE

    @property
    def projection(self) -> None:
        return None

    @property
    def main(self) -> tuple[ConvBNNames, ...]:
        return (self.unit,)

    @property
    def units(self) -> tuple[ConvBNNames, ...]:
        return (self.unit,)

    @property
    def form(self) -> str:
        return "stem: conv-bn-relu" + ("" if self.pool is None else "-maxpool")


Plan = BlockPlan | StemPlan
