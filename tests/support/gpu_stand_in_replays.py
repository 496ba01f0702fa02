"""Training steps on the stand-in for a GPU, run by Python and replayed natively, as a line of JSON.

Run as a script, in a process of its own; `tests/recording/test_recording_on_stand_in.py` reads the line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gpu_stand_in
import torch
from gpu_stand_in import steps

from fusedres.measuring.timing import bootstrap_interval
from fusedres.recording import replays

ROUNDS = 15


def launches(stand_in: gpu_stand_in.StandIn, step: steps.Step) -> int:
    before = stand_in.launches
    step()
    return stand_in.launches - before


def main(folder: str) -> None:
    Path(folder).mkdir(exist_ok=True)
    stand_in = gpu_stand_in.install(folder)
    torch.set_num_threads(1)
    found = {}
    for case in (steps.Case("separate"), steps.Case("gram")):
        replays.forget()
        step = steps.Step(steps.network("resnet50"), case)
        gpu_stand_in.replay_passes(False)
        for _ in range(2):
            step()
        by_python = launches(stand_in, step)
        gpu_stand_in.replay_passes(True)
        for _ in range(3):
            step()
        passes = replays.known().values()
        seconds: dict[bool, list[float]] = {True: [], False: []}
        replayed = launches(stand_in, step)
        for _ in range(ROUNDS):
            for are_on, times in seconds.items():
                gpu_stand_in.replay_passes(are_on)
                times.append(sum(step()))
        ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
        found[case.name] = {
            "launches": [by_python, replayed],
            "passes": len(passes),
            "without_recording": sum(not p.recordings for p in passes),
            "problems": sorted({p.problem for p in passes if p.problem is not None}),
            "ratio": bootstrap_interval(ratios),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
