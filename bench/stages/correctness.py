"""The tests that need a GPU, compute-sanitizer over every raw op, and the test suite with every backend."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import Cell, Settings

from fusedres.ops.cases import SMALL
from fusedres.ops.cases import cases as cases_of
from fusedres.ops.dispatch import AUTO, ENVIRONMENT_VARIABLE, LOADERS
from fusedres.ops.reference import REFERENCE
from fusedres.ops.selftest import outcome

ROOT = Path(__file__).resolve().parents[2]
GPU_TESTS = tuple(f"tests/native/test_gpu_{what}.py" for what in ("ops", "blocks", "graphed"))
REPLAYS = "tests/native/test_gpu_replays.py"
# the report's own test would start this stage again
SUITE = ("tests", *(f"--ignore={file}" for file in (*GPU_TESTS, REPLAYS, "tests/bench/test_bench_report.py")))
DTYPES = ("bfloat16", "float16", "float32")  # in float32 a GPU's 1x1 products are left to the reference
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FEW = ("--shapes", "2", "--without", "reference")  # those whose tensors have several tiles
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


def accuracy(settings: Settings, dtype: str) -> dict[str, Any]:
    """Every op of every backend at small shapes, by the rule of accuracy; how many passed, or were left to another.

    Raises:
        AssertionError: some are wrong, each with what is.
    """
    backends = [load() for name, load in LOADERS.items() if name != REFERENCE.name]
    found = [
        (shape, outcome(backend, settings.device, getattr(torch, dtype), case))
        for shape in SMALL
        for case in cases_of(shape, getattr(torch, dtype), settings.device)
        for backend in backends
    ]
    outcomes = [o for _, o in found]
    wrong = [f"{o.backend} {o.case} {shape}: {o.problem}" for shape, o in found if o.problem is not None]
    assert not wrong, f"{len(wrong)} of {len(outcomes)} are wrong:\n" + "\n".join(wrong)
    unserved = Counter(f"{o.backend}: {o.unserved}" for o in outcomes if o.unserved is not None)
    return {"passed": len(outcomes) - unserved.total(), "unserved": dict(unserved)}


def sanitize(settings: Settings, dtype: str, tool: str, *options: str) -> dict[str, Any]:
    """One tool over the driver, each tensor in an allocation of its own."""
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "99",
        *driver(settings, dtype),
        *options,
    ]
    printed = run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return {"summary": next(line for line in printed.splitlines() if "SUMMARY" in line)}


def cells(settings: Settings) -> list[Cell]:
    tools = [(tool, dtype) for tool in TOOLS for dtype in DTYPES]
    gpu_tool = "cuda", "compute-sanitizer"
    found = [
        *(Cell(f"accuracy/{d}", partial(accuracy, settings, d)) for d in DTYPES),
        Cell("tests/replays", partial(test_suite, AUTO, [REPLAYS]), ("cuda", "module:pytest")),
        *(
            Cell(f"few_shapes/{t}/bfloat16", partial(sanitize, settings, "bfloat16", t, *FEW), gpu_tool)
            for t in ("memcheck", "initcheck", "racecheck", "synccheck")
        ),
        *(Cell(f"every_op/{d}", partial(every_op, settings, d)) for d in DTYPES),
        *(Cell(f"{tool}/{d}", partial(sanitize, settings, d, tool), gpu_tool) for tool, d in tools),
    ]
    if not settings.full:
        roofline = partial(test_suite, AUTO, ["tests/bench/test_bench_roofline.py"])
        return [*found, Cell("tests/roofline", roofline, ("module:pytest",))]
    # the tests of a GPU choose backends themselves; the rest are of CPU tensors, and come last
    needs = "module:pytest", "module:xdist"
    gpu = [Cell(file, partial(test_suite, AUTO, ["-n", "auto", file]), needs) for file in GPU_TESTS]
    rest = [Cell(f"tests/{b}", partial(test_suite, b, ["-n", "auto", *SUITE]), needs) for b in LOADERS]
    return [*gpu, *found, *rest]
