"""One residual block, forward and backward, as a chain of raw ops: a pair of functions per recipe.

`RECIPES` maps a recipe's name to its module, each with `forward` and `backward` of the same signatures.
"""

from __future__ import annotations

from types import ModuleType

from fusedres.blocks import gram, separate

RECIPES: dict[str, ModuleType] = {"separate": separate, "gram": gram}
