"""Finds residual blocks by their dataflow, installs recipes by class swap, reports, verifies and undoes it."""

from fusedres.patching.api import is_patched, patch, report, unpatch
from fusedres.patching.comparison import Comparison, compare
from fusedres.patching.report import BlockReport, PatchReport
from fusedres.patching.scoped import disabled, patched
from fusedres.patching.verify import VerifyReport, verify
from fusedres.patching.warmup import warmup

__all__ = [
    "BlockReport",
    "Comparison",
    "PatchReport",
    "VerifyReport",
    "compare",
    "disabled",
    "is_patched",
    "patch",
    "patched",
    "report",
    "unpatch",
    "verify",
    "warmup",
]
