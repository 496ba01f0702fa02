"""The tests that a GPU is needed for, and compute-sanitizer over every raw op."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from report import Cell, Settings

ROOT = Path(__file__).resolve().parents[2]
GPU_TESTS = ("tests/test_gpu_ops.py", "tests/test_gpu_blocks.py")
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


def test_suite(tests: list[str]) -> dict[str, Any]:
    """Outcomes of the tests, by pytest's own count."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    printed = run(command)
    last = printed.strip().splitlines()[-1]
    return {count[1]: int(count[0]) for count in re.findall(r"(\d+) ([a-z]+)", last.split(" in ")[0])}


def driver(settings: Settings) -> list[str]:
    # in float32 the products of a GPU are left to the reference
    dtype = "bfloat16" if settings.device.type == "cuda" else "float32"
    driver = [sys.executable, str(ROOT / "bench/op_cases.py")]
    return [*driver, "--device", settings.device.type, "--dtype", dtype]


def every_op(settings: Settings) -> dict[str, Any]:
    """The driver by itself, which compute-sanitizer runs otherwise."""
    return {"calls": len(run(driver(settings)).strip().splitlines())}


def sanitize(settings: Settings, tool: str) -> dict[str, Any]:
    """One tool over the driver, each tensor in an allocation of its own."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", *driver(settings)]
    printed = run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return {"summary": next(line for line in printed.splitlines() if "SUMMARY" in line)}


def cells(settings: Settings) -> list[Cell]:
    # they choose their backends themselves; all other tests are of CPU tensors
    tests = GPU_TESTS if settings.full else ("tests/test_bench_roofline.py",)
    return [
        *(Cell(file, partial(test_suite, [file]), ("module:pytest",)) for file in tests),
        Cell("every_op", partial(every_op, settings)),
        *(Cell(tool, partial(sanitize, settings, tool), ("cuda", "compute-sanitizer")) for tool in TOOLS),
    ]
