"""Runs stages of the report and keeps what they find: `<output>/<stage>.json`, written after every cell.

    python bench/report.py STAGE... [--output DIR] [--size small|full] [--seconds 520] [--only REGEX] [--cell-seconds N]

A cell that was measured on this machine is not run again; a failed, skipped or unfinished one is. A cell that failed
or was cut comes last in the next run, so that one that hangs cannot hold up the others. Exit status: 1 where a cell
failed, 3 where one left the device unusable, as an illegal access does, or took longer than a cell may: the rest needs
a new process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

STAGES = ("environment", "baselines", "probes", "correctness", "ops", "blocks", "models")
RUNNING, MEASURED, FAILED, SKIPPED = "running", "measured", "failed", "skipped"
DEVICE_LOST = 3


@dataclass(frozen=True)
class Settings:
    device: torch.device
    full: bool  # the shapes that answer the question, or small ones that only show that the stage runs
    output: Path
    backend: str = "auto"


@dataclass(frozen=True)
class Cell:
    """One measurement: its name, what it needs of the machine, and a function whose result JSON can hold."""

    name: str
    run: Callable[[], dict[str, Any]]
    needs: tuple[str, ...] = ()


def missing(need: str, device: torch.device) -> bool:
    """Whether this machine lacks "cuda", "sm_90", a Python module ("module:triton") or a program."""
    if need == "cuda":
        return device.type != "cuda"
    if need == "sm_90":
        return device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0)
    if need.startswith("module:"):
        return find_spec(need.removeprefix("module:")) is None
    return shutil.which(need) is None


def machine(device: torch.device) -> str:
    """What a measurement depends on: results of another machine are measured again."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


class Results:
    """The JSON file of one stage, replaced as a whole so that a cut run leaves a readable one."""

    def __init__(self, stage: str, settings: Settings) -> None:
        self.path = settings.output / f"{stage}.json"
        self.machine = f"{machine(settings.device)}, {'full' if settings.full else 'small'} size"
        known = json.loads(self.path.read_text())["cells"] if self.path.exists() else {}
        self.cells: dict[str, dict[str, Any]] = known
        self.stage = stage

    def status(self, name: str) -> str | None:
        cell = self.cells.get(name, {})
        return cell["status"] if cell.get("machine") == self.machine else None

    def write(self, name: str, status: str, **found: Any) -> None:
        self.cells[name] = {"status": status, "machine": self.machine, **found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".json.part")
        text = json.dumps({"stage": self.stage, "cells": self.cells}, indent=1, allow_nan=False)
        temporary.write_text(text + "\n")
        os.replace(temporary, self.path)


def end_process() -> None:
    os._exit(DEVICE_LOST)


@contextmanager
def at_most(seconds: float, results: Results, name: str) -> Iterator[None]:
    """Ends the process where a cell takes longer, for nothing else stops one that waits for a kernel."""
    over, lock = False, threading.Lock()

    def cut() -> None:
        with lock:
            if not over:
                results.write(
                    name, FAILED, error=f"cut after {seconds:.0f} s, the longest that a cell may take"
                )
                print(f"{results.stage:12} {name:56} cut after {seconds:.0f} s", flush=True)
                end_process()

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
        timer.cancel()


def run_stage(
    stage: str, settings: Settings, only: str, deadline: float, cell_seconds: float = threading.TIMEOUT_MAX
) -> tuple[int, int]:
    """Runs what is not measured yet until the deadline. Returns how many failed and how many are left."""
    results = Results(stage, settings)
    cells = importlib.import_module(f"stages.{stage}").cells(settings)
    cells = [c for c in cells if re.search(only, c.name) and results.status(c.name) != MEASURED]
    cells.sort(key=lambda c: results.status(c.name) in (RUNNING, FAILED))
    failed = 0
    for done, cell in enumerate(cells):
        if time.monotonic() > deadline:
            return failed, len(cells) - done
        lacking = [need for need in cell.needs if missing(need, settings.device)]
        if lacking:
            results.write(cell.name, SKIPPED, needs=lacking)
            print(f"{stage:12} {cell.name:56} skipped: needs {', '.join(lacking)}", flush=True)
            continue
        results.write(cell.name, RUNNING)
        start = time.monotonic()
        try:
            with at_most(cell_seconds, results, cell.name):
                result = cell.run()
            json.dumps(result, allow_nan=False)
            outcome = {"status": MEASURED, "result": result}
        except Exception:
            traceback.print_exc()
            outcome = {"status": FAILED, "error": traceback.format_exc()}
            failed += 1
        wall = round(time.monotonic() - start, 2)
        results.write(cell.name, outcome.pop("status"), wall_seconds=wall, **outcome)
        print(f"{stage:12} {cell.name:56} {wall:7.1f} s  {headline(outcome)}", flush=True)
        if "error" in outcome and not usable(settings.device):
            print(f"the device is lost after {cell.name}", flush=True)
            raise SystemExit(DEVICE_LOST)
    return failed, 0


def usable(device: torch.device) -> bool:
    """Whether this process can still use the device: after an illegal access every call fails."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


def headline(outcome: dict[str, Any]) -> str:
    """The numbers of a cell's result that fit a line."""
    if "error" in outcome:
        return "FAILED: " + outcome["error"].strip().splitlines()[-1]
    short = {
        k: v for k, v in outcome["result"].items() if isinstance(v, (int, float, str)) and len(str(v)) < 60
    }
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in short.items())


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `settings_of` reads."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--output", type=Path, default=os.environ.get("FUSEDRES_REPORT", "bench/results/report")
    )
    parser.add_argument("--device", default=found)
    parser.add_argument("--size", choices=("small", "full"), default="full" if found == "cuda" else "small")
    parser.add_argument("--backend", default="auto", help="the backend of fusedres")


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(torch.device(args.device), args.size == "full", Path(args.output), args.backend)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default all")
    add_options(parser)
    parser.add_argument("--seconds", type=float, default=520, help="no cell starts after this time")
    parser.add_argument("--only", default="", help="regular expression on cell names")
    parser.add_argument(
        "--cell-seconds", type=float, default=threading.TIMEOUT_MAX, help="no cell takes longer"
    )
    args = parser.parse_args()
    unknown = sorted(set(args.stages) - set(STAGES))
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; choose from {', '.join(STAGES)}")
    return args


def main() -> int:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))  # the rule of accuracy
    args = parse()
    settings = settings_of(args)
    deadline = time.monotonic() + args.seconds
    failed = left = 0
    for stage in args.stages or STAGES:
        stage_failed, stage_left = run_stage(stage, settings, args.only, deadline, args.cell_seconds)
        failed, left = failed + stage_failed, left + stage_left
    if left:
        print(f"{left} cells left: run the same command again")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
