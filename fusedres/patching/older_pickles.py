"""Pickles of patched modules that hold a plan, as older code wrote them.

A plan names classes and functions of the code that it was found in. The plan in a pickle is therefore dropped on
loading, and `install.complete` finds it again. A pickle names the classes of a plan by the modules they had then:
Python is given this module under the names of those.
"""

from __future__ import annotations

import sys
from typing import Any

FORMER_MODULES = ("contents", "plan", "structure")


class Dropped:
    """Stands for whatever a pickle holds of an older plan."""

    def __new__(cls, *args: Any) -> Dropped:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Nothing of it is kept."""


BlockPlan = ConvBNNames = Forwards = Methods = ModuleAttributes = PoolWindow = StemPlan = Submodule = (
    Watched
) = Dropped

for name in FORMER_MODULES:
    sys.modules[f"fusedres.patching.{name}"] = sys.modules[__name__]
