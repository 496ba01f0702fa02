"""The machine as found, and its two ceilings: copy bandwidth and matrix rate, on random data."""

from __future__ import annotations

import platform
import subprocess
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from report import Cell, Settings
from timing import flushed_seconds

from fusedres.measuring.timing import seconds, summary

QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "power.limit,temperature.gpu"
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TINY_LAUNCHES = 200  # about what the finalize steps of one ResNet-50 step would be


def package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package("triton"),
        "fusedres": package("fusedres"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def gpu(settings: Settings) -> dict[str, object]:
    found = torch.cuda.get_device_properties(settings.device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": found.L2_cache_size,
        "memory_bytes": found.total_memory,
    }


def nvidia_smi() -> dict[str, object]:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return dict(zip(QUERY.split(","), printed.strip().split(", "), strict=True))


def tool_version(tool: str) -> dict[str, object]:
    printed = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True, timeout=60)
    return {"version": printed.stdout.strip().splitlines()[-1]}


def copy_bandwidth(settings: Settings) -> dict[str, object]:
    size = 4 << 30 if settings.full else 16 << 20
    source = torch.randn(size // 4, device=settings.device)
    target = torch.empty_like(source)
    times = flushed_seconds(lambda: target.copy_(source), settings.device, 20 if settings.full else 3)
    found = summary(times)
    return {"bytes": 2 * size, "bytes_per_second": 2 * size / found["seconds"], **found}


def matmul_rate(settings: Settings, dtype: torch.dtype) -> dict[str, object]:
    n = 8192 if settings.full else 128
    a, b = (torch.randn(n, n, device=settings.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = flushed_seconds(lambda: torch.mm(a, b, out=out), settings.device, 20 if settings.full else 3)
    found = summary(times)
    return {"size": n, "flops_per_second": 2 * n**3 / found["seconds"], **found}


def launch_cost(settings: Settings) -> dict[str, object]:
    """Time of many kernels on tiny tensors, launched one by one and replayed as a graph."""
    x = torch.randn(256, device=settings.device)

    def many() -> None:
        for _ in range(TINY_LAUNCHES):
            x.mul_(0.5)

    many()
    one_by_one = seconds(many, settings.device) / TINY_LAUNCHES
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    graph.replay()
    return {
        "launch_seconds": one_by_one,
        "graph_seconds": seconds(graph.replay, settings.device) / TINY_LAUNCHES,
    }


def cells(settings: Settings) -> list[Cell]:
    return [
        Cell("versions", versions),
        Cell("gpu", partial(gpu, settings), ("cuda",)),
        Cell("nvidia_smi", nvidia_smi, ("cuda", "nvidia-smi")),
        Cell("nvcc", partial(tool_version, "nvcc"), ("nvcc",)),
        Cell("copy_bandwidth", partial(copy_bandwidth, settings)),
        *(
            Cell(f"matmul_rate/{str(d).removeprefix('torch.')}", partial(matmul_rate, settings, d))
            for d in DTYPES
        ),
        Cell("launch_cost", partial(launch_cost, settings), ("cuda",)),
    ]
