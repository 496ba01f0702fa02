"""Every raw op in every backend at ResNet-50's shapes: time, bandwidth beside a copy's, products beside the library's
own, bytes by the hardware's counters."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from op_cases import checked_bytes, resnet_shape
from report import Cell, Settings
from timing import flushed_seconds

from fusedres.measuring.timing import summary
from fusedres.ops.cases import SMALL, Shape
from fusedres.ops.cases import cases as op_cases
from fusedres.ops.contract import (
    Conv1x1BackwardInput,
    Conv1x1BackwardWeight,
    Conv1x1Forward,
    Conv1x1GramBackwardInput,
    Gram,
    RawOp,
)
from fusedres.ops.dispatch import LOADERS

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
DRIVER = Path(__file__).resolve().parent.parent / "op_cases.py"


def library_product(op: RawOp) -> Callable[[], torch.Tensor] | None:
    """The bare convolution of a fused one by the library, without what is fused; of `gram` a matrix product."""
    if isinstance(op, Conv1x1Forward):
        return partial(F.conv2d, op.x, op.weight)
    if isinstance(op, Gram):
        rows = op.c.permute(0, 2, 3, 1).flatten(0, 2)  # [P, C]
        return partial(torch.mm, rows.t(), rows)
    if isinstance(op, Conv1x1BackwardWeight):
        x, wanted = op.c, (False, True, False)
        weight = x.new_empty(op.dy.shape[1], x.shape[1], 1, 1)
    elif isinstance(op, Conv1x1GramBackwardInput):
        x, wanted = op.c, (True, False, False)
        weight = op.weight_dz.to(x.dtype)[:, :, None, None]
    elif isinstance(op, Conv1x1BackwardInput):
        x, wanted = op.shortcut_dy, (True, False, False)
        weight = op.weight
    else:
        return None
    window = (1, 1), (0, 0), (1, 1), False, (0, 0), 1
    place = wanted.index(True)
    dy = op.dy
    return lambda: torch.ops.aten.convolution_backward(dy, x, weight, None, *window, wanted)[place]


def time_op(settings: Settings, backend: str, shape: Shape, dtype: torch.dtype, name: str) -> dict[str, Any]:
    """Median time with a cold cache, bytes that arguments and results hold, a copy of as many, the bare product."""
    ops = LOADERS[backend]()
    op = next(case.op for case in op_cases(shape, dtype, settings.device) if case.name == name)
    reason = ops.reason(op)
    if reason is not None:
        return {"unsupported": reason}
    run = partial(ops, op)
    moved = checked_bytes(op, run())
    rounds = 20 if settings.full else 1

    def time(run: Callable[[], object]) -> dict[str, float]:
        return summary(flushed_seconds(run, settings.device, rounds))

    times, source = time(run), torch.ones(moved // 8, device=settings.device)
    copied = time(partial(torch.empty_like(source).copy_, source))["seconds"]
    found = {**times, "bytes": moved, "bytes_per_second": moved / times["seconds"]}
    found |= {"copy_seconds": copied, "of_copy": copied / times["seconds"]}
    product = library_product(op)
    return found if product is None else {**found, "library_product_seconds": time(product)["seconds"]}


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
    names = [case.name for case in op_cases(SMALL[0], torch.float32, torch.device("cpu"))]
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
