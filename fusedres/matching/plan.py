"""What the patcher knows of one block: names and plain values only, so that it survives deepcopy and pickle.

Modules are found by name in every call; nothing here refers to one.
"""

from __future__ import annotations

from typing import NamedTuple

from fusedres.blocks.config import Shortcut
from fusedres.modules.tree import Methods, Submodule

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation, groups


class ConvBNNames(NamedTuple):
    """Paths of a convolution and its BN inside the block, whether a ReLU follows, and the geometry found.

    frozen: the norm is no BatchNorm2d but one with frozen constants; eps: that norm's, where it has no attribute.
    """

    conv: str
    bn: str
    relu: bool
    geometry: Geometry
    frozen: bool = False
    eps: float | None = None


class BlockPlan(NamedTuple):
    """One matched block.

    shortcut_paths: the submodules to call for Shortcut.TENSOR, whose outputs are added; structure: the block and
    every module below it, as found; methods: of their classes.
    """

    main: tuple[ConvBNNames, ...]
    shortcut: Shortcut
    projection: ConvBNNames | None
    shortcut_paths: tuple[str, ...]
    structure: tuple[Submodule, ...]
    methods: Methods

    @property
    def method(self) -> str:
        """The method of the class that is replaced."""
        return "forward"

    @property
    def whole(self) -> bool:
        """Whether the plan is for all of the module."""
        return True

    @property
    def units(self) -> tuple[ConvBNNames, ...]:
        return self.main if self.projection is None else (*self.main, self.projection)

    @property
    def form(self) -> str:
        """A short description, for the report: kernel count and shortcut."""
        return f"{len(self.main)} conv-bn, {self.shortcut.value} shortcut"


class PoolWindow(NamedTuple):
    """A max-pooling without a module: height and width of its window, its stride and padding."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


class StemPlan(NamedTuple):
    """A stem: the method that computes it, its convolution and BN, its pooling if it has one, by path or numbers.

    parts: of a model's own stem, the submodules that it calls, in their order; structure: of a module that is a stem,
    as of a block. goes_on: the method runs the rest of the model too.
    """

    method: str
    unit: ConvBNNames
    pool: str | PoolWindow | None
    parts: tuple[Submodule, ...]
    structure: tuple[Submodule, ...]
    methods: Methods
    goes_on: bool

    @property
    def whole(self) -> bool:
        """Whether the module is a stem and nothing else."""
        return bool(self.structure)

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
