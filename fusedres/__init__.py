"""fusedres: an existing PyTorch ResNet, patched in place, with fused residual blocks and hand-written backward.

    import fusedres
    model = fusedres.patch(model)
    print(fusedres.report(model))

Importing it needs torch alone, touches no GPU and prints nothing.
"""

from importlib.metadata import version

from fusedres import models
from fusedres.autograd import flops
from fusedres.errors import (
    BackendUnavailableError,
    CaptureError,
    FusedresError,
    UnsupportedModelError,
    VerificationError,
)
from fusedres.measuring.compare import Comparison, compare
from fusedres.measuring.graphed import graphed
from fusedres.measuring.verify import VerifyReport, verify
from fusedres.measuring.warmup import warmup
from fusedres.ops.dispatch import use_backend
from fusedres.patching.api import is_patched, patch, report, unpatch
from fusedres.patching.report import BlockReport, PatchReport
from fusedres.patching.scoped import disabled, patched

flops.register()

__version__ = version("fusedres")

__all__ = [
    "BackendUnavailableError",
    "BlockReport",
    "CaptureError",
    "Comparison",
    "FusedresError",
    "PatchReport",
    "UnsupportedModelError",
    "VerificationError",
    "VerifyReport",
    "compare",
    "disabled",
    "graphed",
    "is_patched",
    "models",
    "patch",
    "patched",
    "report",
    "unpatch",
    "use_backend",
    "verify",
    "warmup",
]
