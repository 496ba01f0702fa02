"""Questions later kernels hang on: fused Triton 1x1 against cuDNN, wgmma with shifted start addresses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from accuracy import relative_error
from report import Cell, Settings
from timing import flushed_seconds
from torch import Tensor

from fusedres.measuring.timing import summary

# stage of ResNet-50 and direction: height and width, Cin, Cout
SHAPES = {
    "1_expand": (56, 64, 256),
    "1_reduce": (56, 256, 64),
    "2_reduce": (28, 512, 128),
    "3_expand": (14, 256, 1024),
    "3_reduce": (14, 1024, 256),
    "4_reduce": (7, 2048, 512),
}
FOLDER = Path(__file__).resolve().parent.parent


def kernels(settings: Settings) -> ModuleType:
    """The Triton kernels; without a GPU under the interpreter, which must be chosen before the import."""
    if settings.device.type != "cuda":
        os.environ["TRITON_INTERPRET"] = "1"
    import probe_kernels

    return probe_kernels


class Case:
    """Tensors of one 1x1 convolution as matrices: x [P, Cin], w [Cout, Cin], dz and c [P, Cout]."""

    def __init__(self, settings: Settings, shape: str) -> None:
        side, self.cin, self.cout = SHAPES[shape]
        batch = 256
        if not settings.full:
            side, self.cin, self.cout, batch = 7, 64, 128, 2
            if shape.endswith("reduce"):
                self.cin, self.cout = self.cout, self.cin
        self.batch, self.side, self.rows = batch, side, batch * side * side
        self.dtype = torch.bfloat16 if settings.device.type == "cuda" else torch.float16
        self.device = settings.device
        torch.manual_seed(0)
        self.x, self.w = (
            self.random(self.rows, self.cin),
            self.random(self.cout, self.cin, scale=self.cin**-0.5),
        )
        self.dz, self.c = self.random(self.rows, self.cout), self.random(self.rows, self.cout)
        self.scale, self.shift, self.mean = (self.vector(self.cin) for _ in range(3))
        self.coefficients = tuple(self.vector(self.cout) for _ in range(3))

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)

    def vector(self, channels: int) -> Tensor:
        return torch.randn(channels, device=self.device) * 0.5 + 0.5

    def image(self, matrix: Tensor) -> Tensor:
        """[P, C] as [N, C, H, W] in channels_last, the same memory."""
        return matrix.view(self.batch, self.side, self.side, -1).permute(0, 3, 1, 2)


def forward_library(case: Case) -> Callable[[], object]:
    x, w = case.image(case.x), case.w[:, :, None, None].contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(x, w)


def backward_library(case: Case) -> Callable[[], object]:
    dc, x = case.image(case.c), case.image(case.x)
    w = case.w[:, :, None, None].contiguous(memory_format=torch.channels_last)
    mask = [True, False, False]
    args = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)
    return lambda: torch.ops.aten.convolution_backward(dc, x, w, *args)


def forward_exact(case: Case) -> list[Tensor]:
    """The fused forward in float64, rounded where the kernel rounds its prologue: y, a."""
    a = torch.relu(case.x.double() * case.scale + case.shift).to(case.dtype)
    return [a.double() @ case.w.double().t(), a]


def backward_exact(case: Case, skip: Tensor | None) -> list[Tensor]:
    """The fused input gradient likewise: dx, dc."""
    A, B, K = case.coefficients
    dc = (case.dz.double() * A + case.c.double() * B + K).to(case.dtype)
    dx = dc.double() @ case.w.double()
    if skip is not None:
        return [dx + skip.double(), dc]
    stopped = (case.x.float() * case.scale + case.shift).to(case.dtype) <= 0
    return [torch.where(stopped, 0, dx), dc]


def moved_bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def check(found: list[Tensor], exact: list[Tensor], mean: Tensor | None, below: Tensor) -> dict[str, float]:
    """Errors of the outputs and tile sums against float64.

    Raises:
        AssertionError: an output is off by more than twice its rounding, or sums do not belong to it.
    """
    eps = torch.finfo(found[0].dtype).eps
    errors = {name: relative_error(f, e) for name, f, e in zip(("out", "side"), found, exact, strict=False)}
    assert max(errors.values()) <= 2 * eps, f"relative errors {errors}, rounding {eps:.1e}"
    if len(found) > 2:
        out = found[0].double()
        second = out * out if mean is None else out * (below.double() - mean)
        for name, tiles, value in (("sum", found[2], out), ("second_sum", found[3], second)):
            limit = 1e-5 * value.abs().sum().item()
            errors[name] = (tiles.double().sum(0) - value.sum(0)).abs().sum().item()
            assert errors[name] <= limit, f"{name}: off by {errors[name]:.2e}, limit {limit:.2e}"
    return errors


def conv1x1(settings: Settings, direction: str, shape: str) -> dict[str, Any]:
    """Median times of cuDNN's bare convolution and of every tile of the fused kernel, after a check."""
    module, case = kernels(settings), Case(settings, shape)
    skip = case.random(case.rows, case.cin) if case.cin > case.cout else None
    forward = direction == "forward"
    rounds = 20 if settings.full else 1
    library = forward_library(case) if forward else backward_library(case)
    found: dict[str, Any] = {"library": summary(flushed_seconds(library, settings.device, rounds))}
    columns, inner = (case.cout, case.cin) if forward else (case.cin, case.cout)
    for tile in (t for t in module.TILES if module.fits(t, columns, inner)):
        if forward:
            run = partial(module.conv1x1_forward, case.x, case.w, case.scale, case.shift, tile)
            reads, exact = [case.x, case.w], forward_exact(case)
        else:
            vectors = (case.scale, case.shift, case.mean)
            arguments = (case.dz, case.c, case.w, case.coefficients, skip, case.x, vectors, tile)
            run = partial(module.conv1x1_backward_input, *arguments)
            reads = [case.dz, case.c, case.w, case.x if skip is None else skip]
            exact = backward_exact(case, skip)
        outputs = run()
        errors = check(outputs, exact, None if forward else case.mean, case.x)
        times = summary(flushed_seconds(run, settings.device, rounds))
        moved = moved_bytes([*reads, *outputs])
        found["x".join(map(str, tile))] = {**times, "bytes_per_second": moved / times["seconds"], **errors}
        found["bytes"] = moved
        found["flops"] = 2 * case.rows * case.cin * case.cout
        if not settings.full:
            break
    return found


def ahead_of_time() -> dict[str, Any]:
    """What ptxas says of both kernels for sm_90.

    Raises:
        AssertionError: spilled registers, serialised wgmma or no wgmma at all.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(FOLDER / "probe_kernels.py"), "90"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=500)
    found = json.loads(done.stdout)
    for name, kernel in found.items():
        good = kernel["spill_bytes"] == kernel["serialized"] == 0 and kernel["wgmma"] > 0
        assert good, f"{name}: {kernel}"
    return found


def build_wgmma(folder: str) -> str:
    program = f"{folder}/wgmma_probe"
    command = ["nvcc", "-gencode=arch=compute_90a,code=sm_90a", str(FOLDER / "wgmma_probe.cu"), "-o", program]
    subprocess.run(command, check=True, timeout=300)
    return program


def compile_wgmma() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return {"bytes": Path(build_wgmma(folder)).stat().st_size}


def run_wgmma() -> dict[str, Any]:
    """Wrong elements for every shift of the start address, and whether shifting works."""
    with tempfile.TemporaryDirectory() as folder:
        printed = subprocess.run(
            [build_wgmma(folder)], capture_output=True, text=True, check=True, timeout=60
        )
    wrong = json.loads(printed.stdout)
    return {"shifts_work": not any(wrong["documented"]), "wrong": wrong}


def cells(settings: Settings) -> list[Cell]:
    shapes = SHAPES if settings.full else ("1_expand", "1_reduce")
    return [
        Cell("wgmma_shift/compile", compile_wgmma, ("nvcc",)),
        Cell("wgmma_shift/run", run_wgmma, ("nvcc", "sm_90")),
        Cell("ahead_of_time/sm_90", ahead_of_time, ("module:triton",)),
        *(
            Cell(f"conv1x1_{d}/{shape}", partial(conv1x1, settings, d, shape), ("module:triton",))
            for shape in shapes
            for d in ("forward", "backward_input")
        ),
    ]
