"""One residual block, forward and backward, as a chain of raw ops: a pair of functions per recipe.

`RECIPES` maps a recipe's name to its `Recipe`, each with `forward` and `backward` of the same signatures.
"""

from __future__ import annotations

from fusedres.blocks import gram, prologue, separate
from fusedres.blocks.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    "separate": Recipe(separate),
    "prologue": Recipe(prologue),
    "gram": Recipe(gram),
}
