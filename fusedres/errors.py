"""Exceptions of fusedres. Each message says what failed, what was found against what is needed, and the fix."""


class FusedresError(RuntimeError):
    """Base of every error that fusedres raises on its own account."""


class UnsupportedModelError(FusedresError):
    """The model, as a whole, cannot be patched or unpatched as asked."""


class BackendUnavailableError(FusedresError):
    """A backend was asked for by name that this installation or machine does not have."""


class CaptureError(FusedresError):
    """A CUDA graph cannot hold what a model does, or does not hold what is asked of it now."""


class VerificationError(FusedresError):
    """A patched model computes something else than the unpatched one."""
