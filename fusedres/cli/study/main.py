"""`fusedres study`: runs the tasks of one study or of all, and writes tables, pictures, results and the page."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fusedres.blocks.machine import device_name
from fusedres.cli.study import (
    comparison,
    data,
    depth,
    depth_plot,
    depth_result,
    exits,
    exits_plot,
    exits_result,
    gradients,
    gradients_plot,
    gradients_result,
    landscape,
    landscape_plot,
    landscape_result,
    page,
    panels,
    tasks,
)
from fusedres.cli.study.figures import rounded
from fusedres.cli.study.settings import Settings
from fusedres.cli.study.store import Store, write
from fusedres.measuring.progress import Progress
from fusedres.text_table import section

TASKS = {  # in the order of the claims
    "gradients": gradients.tasks,
    "depth": depth.tasks,
    "exits": exits.tasks,
    "landscape": landscape.tasks,
}
RESULTS = {
    "gradients": gradients_result,
    "depth": depth_result,
    "exits": exits_result,
    "landscape": landscape_result,
}
PLOTS = {"gradients": gradients_plot, "depth": depth_plot, "exits": exits_plot, "landscape": landscape_plot}
ALL = "all"
RESUME = "resume"  # the folder with finished tasks, in the output's


def chosen(study: str) -> list[str]:
    """
    Raises:
        ValueError: there is no such study.
    """
    if study != ALL and study not in TASKS:
        raise ValueError(f"fusedres study: no study {study!r}, choose from {', '.join([*TASKS, ALL])}")
    return list(TASKS) if study == ALL else [study]


def identity(settings: Settings, images: data.Images) -> dict[str, Any]:
    """What has to be the same where a run goes on with what another one finished."""
    return {
        "seeds": settings.seeds,
        "size": settings.name,
        "images": images.source,
        "digest": images.digest(),
        "fusedres": version("fusedres"),
        "torch": str(torch.__version__),
        "settings": asdict(settings),
    }


def results(
    context: tasks.Context, names: list[str], workers: int, progress: Progress
) -> tuple[dict[str, Any], int]:
    """Every study's summary, and the processor's seconds of their tasks; those that two share are done once."""
    wanted = {
        task.name: task for name in names for task in [comparison.task(name), *TASKS[name](context.settings)]
    }
    tasks.run(context, list(wanted.values()), workers, progress)
    found: dict[str, Any] = {name: context.store.load(name) for name in wanted}
    took = sum(one.pop(tasks.SECONDS, 0) for one in found.values())
    found["classes"] = len(context.images.classes)
    summaries = {}
    for name in names:
        compared = found[f"comparison-{name}"]
        summaries[name] = {**RESULTS[name].summary(context.settings, found), "comparison": compared}
    return rounded(summaries), round(took)


def text(name: str, found: dict[str, Any]) -> str:
    """A study as lines: the table, what it says of each claim, and notes."""
    sentences = [one["sentence"] for one in found["claims"]]
    return "\n".join(
        [
            section(f"{found['title']} (study {name}). {found['table_title']}:", found["table"]),
            "",
            *(f"  - {sentence}" for sentence in [*sentences, *found["notes"], compared(found)]),
            "",
        ]
    )


def compared(found: dict[str, Any]) -> str:
    check = found["comparison"]
    return (
        f"Patched and unpatched networks gave the same {check['figures']} figures at small size, in float64, to "
        f"{check['error']:.1e} of their norm (allowed: {check['limit']:.0e})."
    )


def shown_text(found: dict[str, Any], output: Path) -> str:
    """All that a person is told on the terminal."""
    parts = [text(name, one) for name, one in found["studies"].items()]
    return "\n".join([*parts, f"{output} holds the pictures, the results and what is needed to go on"])


def run_study(
    study: str,
    output: Path,
    settings: Settings,
    images: data.Images,
    workers: int,
    progress: Progress,
) -> dict[str, Any]:
    """Runs what is missing, writes the files into `output`, and returns what results.json holds.

    Raises:
        ValueError: an unknown study, or a folder that holds another one.
        VerificationError: patched networks differ from unpatched ones, or did not run fused.
    """
    names = chosen(study)
    store = Store(output / RESUME)
    store.open(identity(settings, images))
    start = time.monotonic()
    summaries, took = results(tasks.Context(settings, images, store), names, workers, progress)
    found = {
        "machine": device_name(torch.device("cpu")),
        "seconds": round(time.monotonic() - start),
        tasks.SECONDS: took,  # of all tasks, those of earlier runs included
        "workers": workers,
        **identity(settings, images),
        "studies": summaries,
    }
    drawn = {name: PLOTS[name].panels(summaries[name]["data"]) for name in names}
    for name in names:
        write(output / f"{name}.png", panels.png(drawn[name]))
    write(output / ("results.json" if study == ALL else f"{study}.json"), json.dumps(found).encode())
    if study == ALL:
        write(output / "index.html", page.html(found, drawn, compared).encode())
    return found
