"""Every raw op in every backend at ResNet-50's shapes: time, bandwidth, bytes by the hardware's counters."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from op_cases import checked_bytes, resnet_shape
from report import Cell, Settings
from timing import flushed_seconds

from fusedres.dispatch import LOADERS
from fusedres.op_cases import SMALL, Shape
from fusedres.op_cases import cases as op_cases
from fusedres.timing import summary

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
DRIVER = Path(__file__).resolve().parent.parent / "op_cases.py"


def time_op(settings: Settings, backend: str, shape: Shape, dtype: torch.dtype, name: str) -> dict[str, Any]:
    """Median time with a cold cache, bytes that arguments and results hold, and their ratio."""
    ops = LOADERS[backend]()
    op, arguments = next((o, a) for n, o, a in op_cases(shape, dtype, settings.device) if n == name)
    reason = ops.supports(op, *arguments)
    if reason is not None:
        return {"unsupported": reason}
    run = partial(getattr(ops, op), *arguments)
    moved = checked_bytes(op, arguments, run())
    times = summary(flushed_seconds(run, settings.device, 20 if settings.full else 1))
    return {**times, "bytes": moved, "bytes_per_second": moved / times["seconds"]}


def dram_bytes(backend: str, stage: int, name: str) -> dict[str, Any]:
    """Bytes that one call moved to and from DRAM, kernel by kernel, by the hardware's counters."""
    chosen = ["--backend", backend, "--only", f"^{name}$", "--stage", str(stage), "--dtype", "bfloat16"]
    driver = [sys.executable, str(DRIVER), *chosen]
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv"]
    command = ["ncu", *options, "--metrics", ",".join(METRICS), *driver]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    table = printed[printed.index('"ID"') :]
    units = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    kernels: dict[str, float] = {}
    for row in csv.DictReader(io.StringIO(table)):
        value = float(row["Metric Value"].replace(",", "")) * units[row["Metric Unit"]]
        kernels[row["Kernel Name"]] = kernels.get(row["Kernel Name"], 0.0) + value
    return {"kernels": kernels}


def cells(settings: Settings) -> list[Cell]:
    if settings.full:
        shapes = {f"stage{stage}": resnet_shape(stage, 256) for stage in (1, 2, 3, 4)}
        dtypes = [torch.bfloat16]
    else:
        shapes, dtypes = {"small": SMALL[0]}, [torch.float32]
    names = [name for name, _, _ in op_cases(SMALL[0], torch.float32, torch.device("cpu"))]
    timed = [
        Cell(f"{backend}/{name}/{label}", partial(time_op, settings, backend, shape, dtype, name))
        for backend in LOADERS
        for label, shape in shapes.items()
        for dtype in dtypes
        for name in names
    ]
    counted = [
        Cell(f"dram/{backend}/{name}", partial(dram_bytes, backend, 2, name), ("cuda", "ncu"))
        for backend in LOADERS
        if backend != "reference"
        for name in names
    ]
    return timed + counted
