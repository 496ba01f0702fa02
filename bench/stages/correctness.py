"""The tests that need a GPU, compute-sanitizer over every raw op, and the test suite with every backend."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from report import Cell, Settings

from fusedres.ops.dispatch import AUTO, ENVIRONMENT_VARIABLE, LOADERS

ROOT = Path(__file__).resolve().parents[2]
GPU_TESTS = tuple(f"tests/native/test_gpu_{what}.py" for what in ("ops", "blocks", "graphed"))
# the report's own test would start this stage again
SUITE = ("tests", *(f"--ignore={file}" for file in (*GPU_TESTS, "tests/bench/test_bench_report.py")))
DTYPES = ("bfloat16", "float16", "float32")  # in float32 a GPU's 1x1 products are left to the reference
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
KEPT_OUTPUT = 4000  # characters from the end of a failed command's output
SECONDS = 480


def run(command: list[str], **environment: str) -> str:
    """Output of a command.

    Raises:
        RuntimeError: it failed; the end of its output is in the message.
    """
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-KEPT_OUTPUT:]}")
    return done.stdout


def test_suite(backend: str, arguments: list[str]) -> dict[str, Any]:
    """Outcomes of the tests, by pytest's own count."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    printed = run(command, **{ENVIRONMENT_VARIABLE: backend})
    last = printed.strip().splitlines()[-1]
    return {count[1]: int(count[0]) for count in re.findall(r"(\d+) ([a-z]+)", last.split(" in ")[0])}


def driver(settings: Settings, dtype: str) -> list[str]:
    command = [sys.executable, str(ROOT / "bench/op_cases.py")]
    return [*command, "--device", settings.device.type, "--dtype", dtype]


def every_op(settings: Settings, dtype: str) -> dict[str, Any]:
    """The driver by itself, which compute-sanitizer runs otherwise."""
    return {"calls": len(run(driver(settings, dtype)).strip().splitlines())}


def sanitize(settings: Settings, dtype: str, tool: str) -> dict[str, Any]:
    """One tool over the driver, each tensor in an allocation of its own."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", *driver(settings, dtype)]
    printed = run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return {"summary": next(line for line in printed.splitlines() if "SUMMARY" in line)}


def cells(settings: Settings) -> list[Cell]:
    tools = [(tool, dtype) for tool in TOOLS for dtype in DTYPES]
    found = [
        *(Cell(f"every_op/{d}", partial(every_op, settings, d)) for d in DTYPES),
        *(
            Cell(f"{tool}/{d}", partial(sanitize, settings, d, tool), ("cuda", "compute-sanitizer"))
            for tool, d in tools
        ),
    ]
    if not settings.full:
        roofline = partial(test_suite, AUTO, ["tests/bench/test_bench_roofline.py"])
        return [*found, Cell("tests/roofline", roofline, ("module:pytest",))]
    # the tests of a GPU choose backends themselves; the rest are of CPU tensors, and come last
    needs = "module:pytest", "module:xdist"
    gpu = [Cell(file, partial(test_suite, AUTO, ["-n", "auto", file]), needs) for file in GPU_TESTS]
    rest = [Cell(f"tests/{b}", partial(test_suite, b, ["-n", "auto", *SUITE]), needs) for b in LOADERS]
    return [*gpu, *found, *rest]
