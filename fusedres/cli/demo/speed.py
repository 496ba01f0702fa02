"""What patching gains: ResNets of full size, unpatched against patched by default, interleaved in one process."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from fusedres.blocks import RECIPES
from fusedres.blocks.machine import device_name
from fusedres.cli import devices, model_names
from fusedres.measuring.compare import Comparison, PhaseComparison, compare
from fusedres.measuring.kept import kept_bytes
from fusedres.measuring.progress import Progress
from fusedres.patching import api
from fusedres.text_table import section

BATCH = 16
CHECKED = 4  # of the images: in float64 all of them take as long as the timing
SIZE = 224
CASES = (("ResNet-50", "fusedres:resnet50", 7), ("ResNet-18", "fusedres:resnet18", 9))  # and rounds
PHASES = {"training": "training step", "inference": "inference"}


@dataclass(frozen=True)
class Measured:
    """One model: its times in both phases, and the bytes that a forward keeps for backward, before and after."""

    title: str
    name: str
    comparison: Comparison
    unpatched_bytes: int
    patched_bytes: int

    def as_dict(self) -> dict[str, Any]:
        memory = {"unpatched_bytes": self.unpatched_bytes, "patched_bytes": self.patched_bytes}
        return {"title": self.title, "model": self.name, **self.comparison.as_dict(), **memory}


@dataclass(frozen=True)
class Line:
    """One line of the table.

    gain: unpatched / patched, above 1 the patched model is better; low, high: its interval.
    """

    what: str
    unpatched: str
    patched: str
    gain: float
    low: float
    high: float
    interval: str
    fused: str
    remark: str  # said of the line where its gain is below 1

    @property
    def is_below(self) -> bool:
        """As it is shown, to two places."""
        return round(self.gain, 2) < 1


def measure(title: str, name: str, rounds: int, device: torch.device, progress: Progress) -> Measured:
    """The model patched by default against itself, once both are known to compute the same.

    Raises:
        VerificationError: they do not.
    """

    def told(what: str, done: int, total: int) -> None:
        progress(f"{title}: {what}", done, total)

    network, images = devices.put(model_names.build(name), model_names.images(BATCH, SIZE), device)
    comparison = compare(network, images, rounds=rounds, check_with=images[:CHECKED], progress=told)
    patched = api.patch(copy.deepcopy(network))
    kept = [kept_bytes(model, (images,)) for model in (network, patched)]
    return Measured(title, name, comparison, *kept)


def machine(device: torch.device) -> str:
    return device_name(device)


def title(device: torch.device) -> str:
    return (
        f"unpatched against patched by default, {SIZE} x {SIZE}, batch {BATCH}, float32, channels_last, "
        f"on {machine(device)}"
    )


def remark(phase: PhaseComparison, name: str) -> str:
    """What a ratio below 1 means."""
    if not phase.fused:
        return (
            "no block ran fused there, so both computed the same way and the rest is noise: "
            f"`fusedres explain {name} --batch {BATCH}` says why, `fusedres tune {name}` measures this machine"
        )
    return "slower: leave it unpatched there" if phase.is_slower else "no faster within the noise"


def time_line(m: Measured, phase: PhaseComparison) -> Line:
    fused = sum(count for recipe, count in phase.runs_as.items() if recipe in RECIPES)
    return Line(
        what=f"{m.title}, {PHASES[phase.phase]}",
        unpatched=f"{phase.unpatched_seconds * 1e3:.0f} ms",
        patched=f"{phase.patched_seconds * 1e3:.0f} ms",
        gain=phase.ratio,
        low=phase.low,
        high=phase.high,
        interval=phase.interval,
        fused=f"{fused} of {sum(phase.runs_as.values())}",
        remark=remark(phase, m.name),
    )


def memory_line(m: Measured) -> Line:
    gain = m.unpatched_bytes / m.patched_bytes
    return Line(
        what=f"{m.title}, kept for backward",
        unpatched=f"{m.unpatched_bytes / 2**20:.0f} MiB",
        patched=f"{m.patched_bytes / 2**20:.0f} MiB",
        gain=gain,
        low=gain,
        high=gain,
        interval="counted",
        fused="",
        remark="the patched model keeps more",
    )


def lines(found: list[Measured]) -> list[Line]:
    """Two of time and one of memory for each model."""
    return [line for m in found for line in (*(time_line(m, p) for p in m.comparison.phases), memory_line(m))]


def text(found: list[Line], device: torch.device) -> str:
    """The table, and below it every line whose ratio is below 1 by name."""
    rows = [("", "unpatched", "patched", "unpatched / patched", "95 %", "blocks fused")]
    rows += [(li.what, li.unpatched, li.patched, f"{li.gain:.2f}x", li.interval, li.fused) for li in found]
    below = [
        f"below 1.0x: {li.what}, {li.gain:.2f}x {li.interval}: {li.remark}" for li in found if li.is_below
    ]
    notes = below or ["no line is below 1.0x"]
    checked = f"whatever ran fused was held against the unpatched model first, with {CHECKED} images, in float64 too"
    return section(title(device), rows, "above 1.0x the patched model is better", *notes, checked)
