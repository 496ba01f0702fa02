"""fusedres: an existing PyTorch ResNet, patched in place, with fused residual blocks and hand-written backward.

    import fusedres
    model = fusedres.patch(model)
    print(fusedres.report(model))

Importing it needs torch alone, touches no GPU and prints nothing.
"""

from importlib.metadata import version

from fusedres import block_flops, models
from fusedres.errors import BackendUnavailableError, FusedresError, UnsupportedModelError, VerificationError
from fusedres.ops.dispatch import use_backend
from fusedres.patching import (
    BlockReport,
    Comparison,
    PatchReport,
    VerifyReport,
    compare,
    disabled,
    is_patched,
    patch,
    patched,
    report,
    unpatch,
    verify,
    warmup,
)

block_flops.register()

__version__ = version("fusedres")

__all__ = [
    "BackendUnavailableError",
    "BlockReport",
    "Comparison",
    "FusedresError",
    "PatchReport",
    "UnsupportedModelError",
    "VerificationError",
    "VerifyReport",
    "compare",
    "disabled",
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
