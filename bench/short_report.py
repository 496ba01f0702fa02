"""The report within a budget: what is worth most first, each cell bounded, the whole over when the budget is.

    python bench/short_report.py [--budget 900] [--output DIR] [--size small|full]

Each part of PLAN is some cells of a stage of `report.py`, run there in a process of its own, and has a share of the
budget; what one leaves goes to the next. A cell that takes too long, or loses the device, costs itself alone: a new
process goes on behind it. Cells that no time is left for are written down as skipped, by name. Results are those of
`report.py`, on disk after every cell; what was measured on this machine is not run again. Exit status: 1 where a cell
failed or was skipped for want of time.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import FAILED, MEASURED, RUNNING, SKIPPED, Results, Settings, add_options, settings_of

REPORT = Path(__file__).with_name("report.py")
LEAST = 10.0  # seconds: no process is started for less
NO_TIME = "time"  # what a cell lacks that the budget had no room for
STEP = "^resnet50/train/bfloat16/256/"


class Part(NamedTuple):
    """Cells of a stage, by a regular expression on their names; seconds: its share, of all of them and of one cell."""

    title: str
    stage: str
    only: str
    seconds: int
    cell_seconds: int


PLAN = (
    Part("environment and ceilings", "environment", "", 45, 30),
    Part("accuracy of every op", "correctness", "^accuracy/bfloat16$", 90, 90),
    Part("replays against Python", "correctness", "^tests/replays$", 60, 60),
    Part("compute-sanitizer", "correctness", "^few_shapes/", 160, 80),
    Part(
        "eager and torch.compile",
        "baselines",
        f"{STEP}(eager_channels_last|torch_compile(_graph)?)$",
        170,
        90,
    ),
    Part("each recipe alone", "models", f"{STEP}fusedres_(separate|gram)$", 120, 80),
    Part(
        "each recipe graphed",
        "models",
        f"{STEP}(fusedres_(separate|gram)|eager_channels_last)_graphed$",
        75,
        60,
    ),
    Part("each recipe compiled", "models", f"{STEP}fusedres_(separate|gram)_compile_graph$", 110, 90),
    Part("kernels against ceilings", "ops", "^(native|triton)/.*/(stage[13]|small)$", 70, 20),
)
BUDGET = sum(part.seconds for part in PLAN)  # 15 minutes
Launch = Callable[[list[str], float], None]


def launch(command: list[str], seconds: float) -> None:
    """Runs a command for so long at most; nothing that it started is left."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def names_of(part: Part, settings: Settings) -> list[str]:
    cells = importlib.import_module(f"stages.{part.stage}").cells(settings)
    return [cell.name for cell in cells if re.search(part.only, cell.name)]


def command_of(part: Part, names: Sequence[str], settings: Settings, seconds: float) -> list[str]:
    """`report.py` for these cells; none of them starts after so many seconds."""
    only = f"^({'|'.join(map(re.escape, names))})$"
    options = {
        "--only": only,
        "--seconds": f"{seconds:.0f}",
        "--cell-seconds": str(part.cell_seconds),
        "--output": str(settings.output),
        "--device": str(settings.device),
        "--size": "full" if settings.full else "small",
        "--backend": settings.backend,
    }
    return [
        sys.executable,
        str(REPORT),
        part.stage,
        *(word for pair in options.items() for word in pair),
    ]


def run_part(part: Part, settings: Settings, stop: float, run: Launch, clock: Callable[[], float]) -> None:
    """Runs the cells of a part that are not measured yet, until `stop`; whatever is left is skipped by name."""
    results = Results(part.stage, settings)
    pending = [name for name in names_of(part, settings) if results.status(name) != MEASURED]
    while pending and (left := stop - clock()) >= LEAST:
        before = {name: results.cells.get(name) for name in pending}
        run(command_of(part, pending, settings, left), left)
        results = Results(part.stage, settings)
        tried = {name for name in pending if results.cells.get(name) != before[name]}
        for name in sorted(tried):
            if results.status(name) == RUNNING:
                results.write(name, FAILED, error="cut: the time of its part was over, or its process ended")
        if not tried:
            for name in pending:
                results.write(name, FAILED, error="its process ended before any cell began")
            return
        pending = [name for name in pending if name not in tried]
    for name in pending:
        results.write(name, SKIPPED, needs=[NO_TIME])
        print(f"{part.stage:12} {name:56} skipped: no time left", flush=True)


def run_plan(
    plan: Sequence[Part],
    settings: Settings,
    budget: float,
    run: Launch = launch,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, list[str]]:
    """Runs the parts in their order. Returns "stage/cell" of every cell of the plan by its status."""
    begin, spent, whole = clock(), 0, sum(part.seconds for part in plan)
    for part in plan:
        spent += part.seconds
        print(f"== {part.title}, at {clock() - begin:.0f} s", flush=True)
        run_part(part, settings, begin + budget * spent / whole, run, clock)
    found: dict[str, list[str]] = {}
    for part in plan:
        results = Results(part.stage, settings)
        for name in names_of(part, settings):
            found.setdefault(results.status(name) or SKIPPED, []).append(f"{part.stage}/{name}")
    return found


def lacks_time(settings: Settings, stage: str, name: str) -> bool:
    return NO_TIME in Results(stage, settings).cells[name].get("needs", ())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds for all of it; default %(default)s"
    )
    add_options(parser)
    args: Any = parser.parse_args()
    settings = settings_of(args)
    found = run_plan(PLAN, settings, args.budget)
    print(", ".join(f"{len(names)} {status}" for status, names in sorted(found.items())))
    unmeasured = [name for name in found.get(SKIPPED, ()) if lacks_time(settings, *name.split("/", 1))]
    for name in (*found.get(FAILED, ()), *unmeasured):
        print(f"not measured: {name}")
    return 1 if found.get(FAILED) or unmeasured else 0


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))  # the rule of accuracy
    torch.set_num_threads(1)  # this process only waits
    sys.exit(main())
