"""A stand-in for a GPU: Triton compiles for sm_90 and launches into a libcuda that runs nothing, on CPU tensors.

Results are garbage. Decisions, launches, compiles, cubins and the host's time are those of a machine with a GPU, but
for what torch itself spends on CUDA tensors. `install()` changes the process for good: use one of its own.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).parent / "libcuda.c"
CAPABILITY = 9, 0
NAME = "stand-in"
SHARED_MEMORY = 232448  # of a block, in bytes


class StandIn:
    """The library, once it is loaded.

    folder: where it lies, and where Triton keeps what it compiles: empty at first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        library = folder / "libcuda.so.1"
        compiled = ["gcc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
        subprocess.run([*compiled, str(SOURCE)], check=True)
        (folder / "libcuda.so").symlink_to(library.name)  # for the linker of Triton's launcher
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # found by its soname from here on

    @property
    def launches(self) -> int:
        return ctypes.c_ulong.in_dll(self._library, "stand_in_launches").value

    @property
    def cubins(self) -> int:
        """How many kernels were compiled."""
        return len(list((self.folder / "cache").glob("*/*.cubin")))

    def fail(self, load: int = 0, launch: int = 0, shared_memory: int = SHARED_MEMORY) -> None:
        """From now on loading a kernel, or launching one, gives this code of CUDA's; 0: success.

        shared_memory: bytes that a block may have, read by Triton as it makes its driver.
        """
        for name, value in (("load_error", load), ("launch_error", launch), ("shared_memory", shared_memory)):
            ctypes.c_int.in_dll(self._library, f"stand_in_{name}").value = value


def device_reason(tensor: Tensor) -> str | None:
    """As that of the Triton backend for a GPU, on CPU tensors: as many questions."""
    from fusedres.ops import triton_reasons

    if tensor.dtype not in triton_reasons.DTYPES:
        return f"dtype_{tensor.dtype}"
    old = triton_reasons.capability(tensor.device) < triton_reasons.OLDEST_CAPABILITY
    return "compute_capability_below_8" if old else triton_reasons.unusable(tensor.device)


def install(folder: str | None = None) -> StandIn:
    """Puts the stand-in in the place of the GPU of this process.

    Args:
        folder: an empty one to work in; None: a temporary one.
    """
    work = Path(folder or tempfile.mkdtemp(prefix="gpu_stand_in"))
    if folder is None:
        atexit.register(shutil.rmtree, work)
    os.environ["TRITON_LIBCUDA_PATH"] = str(work)
    os.environ.setdefault("TRITON_CACHE_DIR", str(work / "cache"))
    found = StandIn(work)
    stand_in_for_decisions()
    stand_in_for_triton()
    replay_passes(True)
    compile_ahead()
    return found


def compile_ahead() -> None:
    """`warmup` compiles for CPU tensors, as for those of a GPU."""
    from fusedres.measuring import compile_ahead

    compile_ahead.DEVICES = {"cpu"}


def replay_passes(are_on: bool) -> None:
    """Whether passes are recorded and replayed, as they are on a GPU."""
    from fusedres.recording import replays

    replays.DEVICES = {"cpu"} if are_on else set()


def stand_in_for_decisions() -> None:
    """What is decided by questions alone is as on a GPU; kernels can be counted, and not launched."""
    stand_in_for_torch()
    stand_in_for_backends()


def stand_in_for_torch() -> None:
    """The questions about devices that the package and Triton ask of torch, at the price that they have there."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: 0
    cuda.set_device = lambda device: None
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.get_device_name = lambda device=None: NAME
    cuda.get_device_properties = lambda device=None: SimpleNamespace(name=NAME, major=9, minor=0)
    cuda.is_current_stream_capturing = lambda: False

    class Device:
        def __init__(self, device: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    cuda.device = Device


def stand_in_for_triton() -> None:
    """Its driver for CUDA is the one there is; Triton makes it as the first kernel is launched, as on a GPU."""
    from triton.backends.nvidia.driver import CudaDriver

    CudaDriver.is_active = staticmethod(lambda: True)
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]


def native_backend(measured: bool) -> Any:
    """measured: as for the native backend's own."""
    from fusedres.ops import fake
    from fusedres.ops.contract import Conv3x3BackwardInput, RawOp
    from fusedres.ops.native import functions, products

    def reason(op: RawOp) -> str | None:
        if measured and not products.is_without_rival(op):
            return "product_not_measured"
        return products.backward_input3x3_window_reason(op) if isinstance(op, Conv3x3BackwardInput) else None

    kinds = tuple(products.PRODUCTS)
    kernels = functions.backend(measured=measured)
    return dataclasses.replace(
        kernels,
        functions={**kernels.functions, **{kind: fake.FUNCTIONS[kind] for kind in kinds}},
        reasons={**kernels.reasons, **dict.fromkeys(kinds, reason)},
    )


def stand_in_for_backends() -> None:
    """Triton serves CPU tensors as it would a GPU's. The native library's kernels of BN are the CPU's, its
    convolutions give tensors without values, and others, which no GPU has, there are none."""
    from fusedres.ops import dispatch, triton, triton_reasons
    from fusedres.ops.native import casts, reasons, winograd
    from fusedres.triton_kernels import layout

    layout.capability = lambda x: CAPABILITY[0]  # type: ignore[assignment]
    reasons.product_dtypes = lambda: ()  # type: ignore[assignment]
    winograd.is_on = lambda: False  # type: ignore[assignment]
    casts.takes = lambda tensor, dtype: {tensor.dtype, dtype} <= casts.DTYPES  # type: ignore[assignment]
    dispatch.LOADERS["native"] = partial(native_backend, measured=False)
    dispatch.AUTO_LOADERS["native"] = partial(native_backend, measured=True)
    dispatch.LOADERS["triton"] = lambda: triton.backend(device_reason)
    measured = triton_reasons.MEASURED_PRODUCTS
    dispatch.AUTO_LOADERS["triton"] = lambda: triton.backend(
        device_reason, lambda op: op.in_scale is not None or NAME in measured
    )
    dispatch._dispatcher.cache_clear()
