"""Every figure of the documentation's tables, and those of README.md's first lines, is in a committed result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = ROOT / "docs/pages"
COLUMNS = (  # of both tables
    "cpu_avx512_zen5/{}_float32",
    "cpu_avx512_zen5/{}_bfloat16",
    "cpu_avx512_amx/{}_float32",
    "cpu_avx512_intel/{}_float32",
    "cpu/{}_batch16",
    "cpu_avx512/{}_float32",
    "cpu_avx512/{}_bfloat16",
)
RERUN = {
    ("cpu_avx512_intel/headline_float32", "train", "resnet50"): "cpu_avx512_intel/headline_float32_again"
}
PHASES = {"training step": "train", "inference": "infer"}
IMPLEMENTATIONS = {"patched": "fusedres_auto", "unpatched in torch.compile": "torch_compile"}
ROW = re.compile(r"^\| ResNet-(\d+), ([a-z ]+), ([a-z. ]+) \| (.+) \|$", re.MULTILINE)


def result(file: str, model: str, phase: str, implementation: str) -> dict[str, float]:
    """What was measured, as committed."""
    file = RERUN.get((file, phase, model), file)
    found = json.loads((ROOT / "bench/results" / f"{file}.json").read_text())["benchmarks"]
    name = f"test_throughput[{model}-{phase}-{implementation}]"
    return next(cell["extra_info"] for cell in found if cell["name"] == name)


def rows(heading: str) -> list[tuple[str, ...]]:
    page = (PAGES / "benchmarks.md").read_text()
    return ROW.findall(page[page.index(heading) :].split("\n\n")[1])


@pytest.mark.parametrize(
    ("heading", "file", "count"),
    [
        ("As many times as fast as the unpatched model in eager", "headline", 4),
        ("As many times as fast as the unpatched model in torch.compile", "compiled_baseline", 4),
    ],
)
def test_the_tables(heading, file, count):
    found = rows(heading)
    assert len(found) == count
    for depth, phase, implementation, cells in found:
        for column, cell in zip(COLUMNS, cells.split(" | "), strict=True):
            info = result(
                column.format(file), f"resnet{depth}", PHASES[phase], IMPLEMENTATIONS[implementation]
            )
            assert cell == f"{info['ratio']:.2f} [{info['ratio_low']:.2f} {info['ratio_high']:.2f}]", column


def test_the_first_lines():
    said = re.findall(
        r"trains\s+(\S+)x\s+and\s+infers\s+(\S+)x\s+as\s+fast\s+as\s+eager,\s+(\S+)x\s+and\s+(\S+)x\s+as\s+fast\s+as\s+torch",
        README,
    )
    machines = "cpu_avx512/{}_float32", "cpu/{}_batch16"
    measured = [
        tuple(
            f"{result(machine.format(file), model, phase, 'fusedres_auto')['ratio']:.2f}"
            for file in ("headline", "compiled_baseline")
            for phase in ("train", "infer")
        )
        for machine in machines
        for model in ("resnet50", "resnet18")
    ]
    assert said == measured


def test_gram_on_a_cpu():
    said = re.search(r"it is slower,\s(\S+)x\sto\s(\S+)x\sof\seager", (PAGES / "how-it-works.md").read_text())
    files = ("cpu/headline_batch16_huge_pages", "cpu/recipes_batch16")
    measured = [result(file, "resnet50", "train", "fusedres_gram")["ratio"] for file in files]
    assert said and list(said.groups()) == [f"{ratio:.2f}" for ratio in measured]
