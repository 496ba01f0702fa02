"""The library of the compiled kernels of `csrc/`, `libfusedres_native.so` beside the package: whether it is there, and
what it says of this processor. `load` brings it in; `fusedres.ops.native.functions` calls its operators.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch

from fusedres.errors import BackendUnavailableError
from fusedres.ops.native import file

NAME = "native"
LIBRARY = Path(__file__).resolve().parent.parent.parent / "libfusedres_native.so"
LIBRARY_OPS = (
    "bn_stats",
    "bn_scale_shift",
    "bn_add_relu_forward",
    "bn_add_relu_backward_reduce",
    "bn_backward_coefficients",
    "bn_add_relu_backward_input",
    "relu_backward",
    "bn_relu_maxpool_forward",
    "bn_relu_maxpool_backward_reduce",
    "bn_relu_maxpool_backward_input",
    "conv1x1_forward",
    "conv_backward_input",
    "conv_backward_input_",
    "conv_backward_weight",
    "cpu_capability",
    "cpu_multiplies_bfloat16",
    "cpu_products_of_bfloat16",
    "cuda_archs",
    "cuda_version",
    "cuda_device_problem",
)


def is_built() -> bool:
    """Whether this installation has the compiled library, loadable or not."""
    return LIBRARY.is_file()


@cache
def load() -> None:
    """Loads the library, once; after this `torch.ops.fusedres_native` has the operators.

    Raises:
        BackendUnavailableError: it is not there, not whole, or not loadable into this process, with this torch or on
            this processor.
    """
    if not is_built():
        raise BackendUnavailableError(
            f"fusedres: the native backend needs {LIBRARY}, which is not there. "
            "Install a wheel that has it, or build from source with g++: "
            "FUSEDRES_BUILD=cpu pip install --no-build-isolation ."
        )
    if (problem := file.problem(LIBRARY)) is not None:
        raise BackendUnavailableError(f"fusedres: {LIBRARY} is not loaded: {problem}")
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise BackendUnavailableError(
            f"fusedres: {LIBRARY} does not load with torch {torch.__version__}: {error}. "
            "Reinstall fusedres for this torch, or use backend='reference'."
        ) from error
    missing = [op for op in LIBRARY_OPS if not hasattr(torch.ops.fusedres_native, op)]
    if missing:
        raise BackendUnavailableError(
            f"fusedres: {LIBRARY} was built from other sources, it lacks {', '.join(missing)}. "
            "Build it again with the package: pip install --no-build-isolation ."
        )
    if torch.ops.fusedres_native.cpu_capability() == "none":
        raise BackendUnavailableError(
            "fusedres: the native backend needs a processor with AVX2 and FMA. Use backend='reference'."
        )


def is_usable() -> bool:
    """Whether the library is here and loads; warns where it is here and does not load."""
    if not is_built():
        return False
    try:
        load()
    except BackendUnavailableError as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        return False
    return True


def instruction_set() -> str | None:
    """What the CPU kernels use on this processor: "avx2" or "avx512"; None where the library is not loaded."""
    ask = getattr(torch.ops.fusedres_native, "cpu_capability", None)
    return ask() if ask else None


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16; False where the library is not loaded."""
    ask = getattr(torch.ops.fusedres_native, "cpu_multiplies_bfloat16", None)
    return bool(ask and ask())
