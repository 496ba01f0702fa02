"""What decides how fast kernels are, for keys of tables: the device, and the versions of all that drives it."""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("fusedres", "torch", "triton")


@cache
def processor() -> str:
    """The CPU's model name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or os.uname().machine


@cache
def gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model and the number of threads."""
    return gpu(device) if device.type == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"


def libraries(device: torch.device) -> str:
    """What besides torch decides how fast convolutions are on a GPU; nothing is named on a CPU."""
    if device.type != "cuda":
        return ""
    search = "on" if torch.backends.cudnn.benchmark else "off"
    return f"driver {driver()}, cuDNN {torch.backends.cudnn.version()}, cudnn.benchmark {search}"


@cache
def driver() -> int:
    """The newest version of CUDA that the driver knows, 13000 for 13.0; 0 without one."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return 0 if ask is None else ask()


@cache
def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    return ", ".join(found)
