"""Each study once patched and once unpatched, at small size: its own figures have to be the same.

In float64, as whole models are compared everywhere in this package: the sign flips of ReLU near zero would drown
everything else in lower precision.
"""

from __future__ import annotations

from typing import Any

from fusedres.cli.study import depth, exits, gradients, landscape
from fusedres.cli.study.tasks import Context, Task
from fusedres.errors import VerificationError
from fusedres.measuring.verify import FLOAT64_LIMIT
from fusedres.ops.accuracy import relative_error

SMALL = {m.__name__.rpartition(".")[2]: m.small for m in (gradients, depth, exits, landscape)}


def compare(context: Context, study: str) -> dict[str, Any]:
    """
    Raises:
        VerificationError: the figures of the patched networks are others.
    """
    unpatched, patched = (SMALL[study](context, is_patched) for is_patched in (False, True))
    error = relative_error(patched, unpatched)
    if not error <= FLOAT64_LIMIT:
        raise VerificationError(
            f"fusedres study {study}: patched and unpatched networks differ by {error:.1e}, allowed is "
            f"{FLOAT64_LIMIT:.0e}; `fusedres doctor` tests the installation"
        )
    return {"figures": unpatched.numel(), "error": error, "limit": FLOAT64_LIMIT}


def task(study: str) -> Task:
    return Task(f"comparison-{study}", compare, (study,))
