"""Options of the throughput comparisons, and the table of ratios that ends a run."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from workloads import BASELINE

RESULTS = pytest.StashKey[list[dict[str, object]]]()


def pytest_addoption(parser):
    group = parser.getgroup("throughput")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", default=found, help="cpu or cuda")
    group.addoption("--dtype", default="float32", help="float32, or autocast to bfloat16 or float16")
    group.addoption("--batch", type=int, help="images a step; the default depends on model and device")
    group.addoption("--backend", default="auto", help="fusedres backend")
    group.addoption("--baseline", default=BASELINE, help="implementation that the others are compared with")
    group.addoption("--rounds", type=int, default=7, help="interleaved rounds a cell")


def pytest_configure(config):
    config.addinivalue_line("markers", "headline: the cells that `make bench` runs")
    config.stash[RESULTS] = []


@pytest.fixture
def results(request) -> list[dict[str, object]]:
    """Where a cell leaves its numbers for the table."""
    return request.config.stash[RESULTS]


def shown(cell: dict[str, object]) -> Text:
    """The ratio with its interval; green where all of it is faster, red where all of it is slower."""
    style = "green" if cell["ratio_low"] >= 1 else "red" if cell["ratio_high"] < 1 else ""
    return Text(f"{cell['ratio']:.2f} [{cell['ratio_low']:.2f} {cell['ratio_high']:.2f}]", style)


def ratio_table(cells: list[dict[str, object]]) -> Table:
    """One row a workload, one column an implementation: times as fast as the baseline."""
    implementations = list(dict.fromkeys(cell["implementation"] for cell in cells))
    against = str(cells[0]["baseline"]).replace("_", " ")
    table = Table(title=f"Times as fast as {against} (median of paired ratios, 95 % interval)")
    table.add_column("workload")
    table.add_column("baseline ms", justify="right")
    for name in implementations:
        table.add_column(str(name).replace("_", " "), justify="right")
    for workload in dict.fromkeys(cell["workload"] for cell in cells):
        row = {cell["implementation"]: cell for cell in cells if cell["workload"] == workload}
        baseline = min(cell["baseline_seconds"] for cell in row.values()) * 1e3
        ratios = [shown(row[name]) if name in row else Text("-") for name in implementations]
        table.add_row(str(workload), f"{baseline:.1f}", *ratios)
    return table


def pytest_terminal_summary(terminalreporter, config):
    cells = config.stash[RESULTS]
    if not cells:
        return
    device = config.getoption("--device")
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console = Console(width=None if terminalreporter.isatty else 150)
    console.print()
    console.print(ratio_table(cells))
    console.print(f"{where}; torch {torch.__version__}")
