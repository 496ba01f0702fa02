"""The state of torch that no argument shows: autocast, grad and inference mode, default dtype, determinism, backends.

A recipe runs a block under the caller's state. A forward that enters another state, or asks for it, is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch

from fusedres.modules.own_code import mentions, outer_values

DEVICES = ("cpu", "cuda")
READS: tuple[Callable[[], Any], ...] = (
    torch.is_grad_enabled,
    torch.is_inference_mode_enabled,
    torch.get_default_dtype,
    torch.is_autocast_cache_enabled,
    torch.are_deterministic_algorithms_enabled,
    torch.is_deterministic_algorithms_warn_only_enabled,
    torch.get_float32_matmul_precision,
    torch.get_num_threads,
    torch.is_anomaly_enabled,
    torch._C._get_cublas_allow_tf32,
    torch._C._get_cudnn_enabled,
    torch._C._get_cudnn_benchmark,
    torch._C._get_cudnn_deterministic,
    torch._C._get_cudnn_allow_tf32,
    torch._C._get_mkldnn_enabled,
    torch._C._get_nnpack_enabled,
    *(lambda device=device: torch.is_autocast_enabled(device) for device in DEVICES),
    *(lambda device=device: torch.get_autocast_dtype(device) for device in DEVICES),
)
QUESTIONS = {  # functions and attributes of torch by which a forward asks for the state
    "_C",
    "are_deterministic_algorithms_enabled",
    "autocast_increment_nesting",
    "backends",
    "get_autocast_cpu_dtype",
    "get_autocast_dtype",
    "get_autocast_gpu_dtype",
    "get_default_device",
    "get_default_dtype",
    "get_deterministic_debug_mode",
    "get_float32_matmul_precision",
    "get_num_interop_threads",
    "get_num_threads",
    "is_anomaly_check_nan_enabled",
    "is_anomaly_enabled",
    "is_autocast_available",
    "is_autocast_cache_enabled",
    "is_autocast_cpu_enabled",
    "is_autocast_enabled",
    "is_deterministic_algorithms_warn_only_enabled",
    "is_grad_enabled",
    "is_inference",
    "is_inference_mode_enabled",
}
ASKED = {id(getattr(torch, name)) for name in QUESTIONS if callable(getattr(torch, name, None))}


def state() -> tuple[Any, ...]:
    """The state now, of this thread and of the process."""
    return tuple(read() for read in READS)


@contextmanager
def autocast(cpu: torch.dtype, cuda: torch.dtype) -> Iterator[None]:
    """Autocast for both kinds of device; a meta tensor of float64 is cast by neither."""
    with ExitStack() as stack:
        for device, dtype in zip(DEVICES, (cpu, cuda), strict=True):
            before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            stack.callback(torch.set_autocast_enabled, device, before[0])
            stack.callback(torch.set_autocast_dtype, device, before[1])
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, dtype)
        yield


def question(functions: Iterable[FunctionType]) -> str | None:
    """The name of a part of the state that one of the functions asks for, or None."""
    for function in functions:
        asked = QUESTIONS & mentions(function)
        if asked:
            return min(asked)
        for value in outer_values(function):
            if asks(value):
                return str(getattr(value, "__name__", type(value).__name__)).rpartition(".")[2]
    return None


def asks(value: Any) -> bool:
    """Whether a value that code finds by another name is a part of torch that answers for its state."""
    if id(value) in ASKED:
        return True
    home = value.__name__ if isinstance(value, ModuleType) else type(value).__module__
    return isinstance(home, str) and (home + ".").startswith("torch.backends.")
