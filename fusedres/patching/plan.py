"""What the patcher knows of one block: names and plain values only, so that it survives deepcopy and pickle.

Modules are found by name in every call; nothing here refers to one.
"""

from __future__ import annotations

from typing import NamedTuple

from fusedres.blocks.config import Shortcut

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation, groups


class ConvBNNames(NamedTuple):
    """Paths of a convolution and its BN inside the block, whether a ReLU follows, and the geometry found."""

    conv: str
    bn: str
    relu: bool
    geometry: Geometry


class BlockPlan(NamedTuple):
    """One matched block.

    shortcut_path: the submodule to call for Shortcut.TENSOR; structure: every submodule's path and class as
    found; attributes: the block's own plain attributes as found.
    """

    main: tuple[ConvBNNames, ...]
    shortcut: Shortcut
    projection: ConvBNNames | None
    shortcut_path: str | None
    structure: tuple[tuple[str, type], ...]
    attributes: tuple[tuple[str, object], ...]

    @property
    def units(self) -> tuple[ConvBNNames, ...]:
        return self.main if self.projection is None else (*self.main, self.projection)

    @property
    def form(self) -> str:
        """A short description, for the report: kernel count and shortcut."""
        return f"{len(self.main)} conv-bn, {self.shortcut.value} shortcut"
