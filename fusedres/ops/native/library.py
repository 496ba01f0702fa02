"""The library of the compiled kernels of `csrc/`, `libfusedres_native.so` beside the package: whether it is there, and
what it says of this processor. `load` brings it in; `fusedres.ops.native.functions` calls its operators.

In a checkout's own folder Python takes the sources for the package; the library is then that of the package installed.
"""

from __future__ import annotations

import platform
import sys
import warnings
from functools import cache
from pathlib import Path

import torch

from fusedres.errors import BackendUnavailableError
from fusedres.ops.native import file

NAME = "native"
PACKAGE = Path(__file__).resolve().parents[2]
FILE = "libfusedres_native.so"
NOTE = "without_kernels.txt"  # of a build that made none: why
SOURCES = PACKAGE.parent / "csrc"  # in a checkout
LIBRARY_OPS = (
    "bn_stats",
    "bn_scale_shift",
    "bn_add_relu_forward",
    "bn_add_relu_forward_out",
    "bn_add_relu_backward_reduce",
    "bn_backward_coefficients",
    "bn_stats_scale_shift",
    "bn_add_relu_backward_reduce_coefficients",
    "bn_add_relu_backward_input",
    "relu_backward",
    "bn_relu_maxpool_forward",
    "bn_relu_maxpool_backward_reduce",
    "bn_relu_maxpool_backward_input",
    "bn_relu_maxpool_backward_input_out",
    "conv1x1_forward",
    "conv1x1_forward_out",
    "conv1x1_backward_input",
    "conv1x1_backward_weight",
    "gram",
    "gram_output_stats",
    "gram_backward_coefficients",
    "conv1x1_gram_backward_input",
    "conv_backward_input",
    "conv_backward_input_out",
    "conv_backward_input_",
    "conv_backward_weight",
    "conv3x3_forward",
    "conv3x3_forward_out",
    "conv3x3_backward_input",
    "conv3x3_backward_input_out",
    "conv3x3_backward_weight",
    "grouped_conv3x3_forward",
    "grouped_conv3x3_forward_out",
    "grouped_conv3x3_backward_input",
    "grouped_conv3x3_backward_weight",
    "bn_running_stats_",
    "cast_",
    "recording_add",
    "recording_drop",
    "replay",
    "replay_failed_step",
    "bundle_tensors",
    "bundle_drop",
    "places_add",
    "places_drop",
    "places_hold",
    "cpu_capability",
    "cpu_multiplies_bfloat16",
    "cpu_products_of_bfloat16",
    "cpu_library_is_wider",
    "cuda_archs",
    "cuda_version",
    "cuda_device_problem",
)


def find(package: Path, path: list[str]) -> Path:
    """The library's place beside the package; in a checkout without it, of a package installed elsewhere on path."""
    if not (package / FILE).is_file() and SOURCES.is_dir():
        for folder in path:
            installed = Path(folder) / package.name
            if (installed / FILE).is_file() or (installed / NOTE).is_file():
                return installed / FILE
    return package / FILE


LIBRARY = find(PACKAGE, sys.path)


def is_built() -> bool:
    """Whether this installation has the compiled library, loadable or not."""
    return LIBRARY.is_file()


_is_loaded = False


@cache
def load() -> None:
    """Loads the library, once; after this `torch.ops.fusedres_native` has the operators.

    Raises:
        BackendUnavailableError: it is not there, not whole, or not loadable into this process, with this torch or on
            this processor.
    """
    if not is_built():
        raise BackendUnavailableError(without_kernels())
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
            "Build it again with the package: pip install ."
        )
    if torch.ops.fusedres_native.cpu_capability() == "none":
        raise BackendUnavailableError(
            "fusedres: the native backend needs a processor with AVX2 and FMA. Use backend='reference'."
        )
    global _is_loaded
    _is_loaded = True


def is_loaded() -> bool:
    """Whether `load` has succeeded in this process."""
    return _is_loaded


def without_kernels() -> str:
    """What is said where the library is not there: why it was not built, if the build noted it, and what mends it."""
    note = LIBRARY.with_name(NOTE)
    why = f" ({note.read_text()})" if note.is_file() else ""
    return (
        f"fusedres: this package has no compiled kernels{why}: the native backend needs {LIBRARY}, which is not "
        "there. Install a wheel that has it, or build from source with g++: "
        "FUSEDRES_BUILD=cpu pip install ."
    )


def could_be_built() -> bool:
    """Whether the kernels are for machines like this one."""
    return (platform.system(), platform.machine()) == ("Linux", "x86_64")


def is_older_than_its_sources() -> bool:
    """Whether a library that was built elsewhere is older than the sources of the checkout that uses it."""
    if LIBRARY.parent == PACKAGE:
        return False
    built = LIBRARY.stat().st_mtime
    return any(
        path.stat().st_mtime > built for path in SOURCES.rglob("*") if path.suffix in (".h", ".cpp", ".cu")
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
    if is_older_than_its_sources():
        warnings.warn(
            f"fusedres: {PACKAGE} is a checkout without a library of its own, and {LIBRARY}, which is used, is older "
            "than its sources. Build it again: pip install .",
            RuntimeWarning,
            stacklevel=2,
        )
    return True


def instruction_set() -> str | None:
    """What the CPU kernels use on this processor: "avx2" or "avx512"; None where the library is not loaded."""
    ask = getattr(torch.ops.fusedres_native, "cpu_capability", None)
    return ask() if ask else None


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16; False where the library is not loaded."""
    ask = getattr(torch.ops.fusedres_native, "cpu_multiplies_bfloat16", None)
    return bool(ask and ask())


def onednn_is_wider() -> bool:
    """Whether oneDNN's convolutions have wider vectors than these kernels; False where the library is not loaded.

    ATEN_CPU_CAPABILITY=avx2 limits torch and these kernels, and oneDNN only with ONEDNN_MAX_CPU_ISA=AVX2.
    """
    ask = getattr(torch.ops.fusedres_native, "cpu_library_is_wider", None)
    return bool(ask and ask())
