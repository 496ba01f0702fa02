"""What the patcher knows of one block: names and plain values only, so that it survives deepcopy and pickle.

Modules are found by name in every call; nothing here refers to one.
"""

from __future__ import annotations

from typing import NamedTuple

from fusedres.blocks.config import Shortcut, Window
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


class Plan(NamedTuple):
    """One matched block or stem.

    projection: with Shortcut.PROJECTION; shortcut_paths: the submodules to call for Shortcut.TENSOR, whose outputs are
    added; pool: a stem's pooling, by its path, or by its numbers where no module does it. structure: the block and
    every module below it, as found; of a stem in a model's own method the submodules that it calls, in their order.
    methods: of their classes. method: the one of the class that is replaced; goes_on: it runs the rest of the model
    too.
    """

    main: tuple[ConvBNNames, ...]
    shortcut: Shortcut
    projection: ConvBNNames | None
    shortcut_paths: tuple[str, ...]
    structure: tuple[Submodule, ...]
    methods: Methods
    pool: str | Window | None = None
    method: str = "forward"
    goes_on: bool = False

    @property
    def whole(self) -> bool:
        """Whether the plan is for all of the module, and not for a model's stem."""
        return self.method == "forward"

    @property
    def is_stem(self) -> bool:
        return self.pool is not None or not self.whole

    @property
    def units(self) -> tuple[ConvBNNames, ...]:
        """main, then the projection."""
        return self.main if self.projection is None else (*self.main, self.projection)

    @property
    def form(self) -> str:
        """A short description, for the report: kernel count and shortcut."""
        if self.is_stem:
            return "stem: conv-bn-relu" + ("" if self.pool is None else "-maxpool")
        return f"{len(self.main)} conv-bn, {self.shortcut.value} shortcut"
