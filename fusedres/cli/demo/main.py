"""`fusedres demo`: small ResNets trained on real images, then what patching gains at the sizes that it is made for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console

from fusedres.cli.demo import digits, speed
from fusedres.cli.demo.plot import plot_curves, plot_gains
from fusedres.measuring.progress import Progress


def run_demo(
    output: Path, epochs: int, with_speed: bool, device: torch.device, progress: Progress
) -> dict[str, object]:
    """Trains and times, prints the tables, and writes pictures and results.json into `output`; returns the latter."""
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    outcomes = digits.run(epochs, progress)
    console.print(digits.curves_table(outcomes))
    console.print(digits.proof_table(outcomes))
    plot_curves({o.title: o.runs for o in outcomes}, output / "curves.png")
    written = [output / "curves.png"]
    results: dict[str, object] = {"digits": [o.as_dict() for o in outcomes], "speed": None}
    if with_speed:
        found = [speed.measure(*case, device, progress) for case in speed.CASES]
        lines = speed.lines(found)
        plot_gains(lines, speed.title(device), output / "speed.png")
        written.append(output / "speed.png")
        results["speed"] = {"machine": speed.machine(device), "models": [f.as_dict() for f in found]}
        # not by the console, which would break lines that are wider than the terminal
        print("\n" + speed.text(lines, device) + "\n", flush=True)
    (output / "results.json").write_text(json.dumps(results, indent=2))
    print(f"wrote {', '.join(map(str, written))} and {output / 'results.json'}")
    return results
