"""Finds residual blocks by their dataflow, installs recipes by class swap, reports, verifies and undoes it."""

from fusedres.patching.api import is_patched, patch, report, unpatch
from fusedres.patching.report import BlockReport, PatchReport
from fusedres.patching.verify import VerifyReport, verify

__all__ = [
    "BlockReport",
    "PatchReport",
    "VerifyReport",
    "is_patched",
    "patch",
    "report",
    "unpatch",
    "verify",
]
