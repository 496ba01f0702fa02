"""Trials on the stand-in for a GPU, with CUDA events that are faked: what a network's blocks come to, as JSON.

Run as a script, in a process of its own, with a folder for the table; `tests/trials/test_gpu_stand_in.py` reads it.
Nothing is compiled and results are garbage: the decisions, and when events are asked, are those of a GPU.
"""

from __future__ import annotations

import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import gpu_stand_in
import torch
from gpu_stand_in import steps
from trials_on import told, trials_on

import fusedres
from fusedres.models import resnet
from fusedres.ops import triton_reasons
from fusedres.trials import clocks, on_block, proof

STEPS = 50
HOST_BOUND = {
    "unfused": 1.0,
    "separate": 1.2,
    "gram": 1.15,
}  # as bench/results/cpu/host_cost_gpu_stand_in.txt
DEVICE_BOUND = {"unfused": 1.6, "separate": 1.2, "gram": 1.0}


class Event:
    """One that the device comes to later: asked for the first time, it has not yet."""

    waited_for = 0
    made = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.asked = 0
        Event.made += 1

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def synchronize(self) -> None:
        Event.waited_for += 1

    def elapsed_time(self, other: Event) -> float:
        return 1.0


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gpu_stand_in.stand_in_for_decisions()
    triton_reasons._usable[torch.device("cpu")] = None  # nothing can be probed
    torch.cuda.Event = Event  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment,return-value]
    resnet.resnet_1_1_1_1 = partial(resnet.ResNet, resnet.Bottleneck, (1, 1, 1, 1))  # type: ignore[attr-defined]
    found = {}
    for name, costs in (("host-bound", HOST_BOUND), ("device-bound", DEVICE_BOUND)):
        with trials_on(folder) as patching, steps.counted_launches(), warnings.catch_warnings():
            warnings.simplefilter("error")
            patching.setattr(proof, "prove", lambda *args: None)
            patching.setattr(on_block, "clock_of", clocks.CudaClock)
            told(patching, costs.__getitem__)
            step = steps.Step(steps.network("resnet_1_1_1_1"), steps.Case("auto", "triton"))
            first = None
            for _ in range(STEPS):
                step()
                first = first or [row.code for row in fusedres.report(step.model).matched]
            rows = fusedres.report(step.model).matched
            found[name] = {
                "first": first,
                "runs_as": {row.name: row.runs_as for row in rows},
                "codes": sorted({str(row.code) for row in rows}),
            }
    print(json.dumps({**found, "events": Event.made, "waited_for": Event.waited_for}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
