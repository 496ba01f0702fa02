"""Faults of a Triton installation on the stand-in for a GPU: what one call comes to with each, as a line of JSON.

Run as a script, in a process of its own; each fault has a fork. `tests/triton/test_set_aside.py` reads the lines.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import gpu_stand_in
import torch
from triton import knobs

from fusedres.ops import set_aside, triton_reasons
from fusedres.ops.contract import BnStats, Conv1x1Forward, RawOp
from fusedres.ops.dispatch import dispatcher

CPU = torch.device("cpu")
REFUSING_PTXAS = """#!/bin/sh
for argument; do
    case $argument in *.ptx) grep -q bn_stats "$argument" && exit 3;; esac
done
exec {real} "$@"
"""


def statistics() -> RawOp:
    return BnStats(torch.randn(2, 8, 3, 3).contiguous(memory_format=torch.channels_last))


def product() -> RawOp:
    x = torch.randn(2, 64, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    return Conv1x1Forward(x, torch.randn(64, 64, 1, 1, dtype=torch.bfloat16))


def no_compiler(stand_in: gpu_stand_in.StandIn) -> RawOp:
    os.environ["PATH"] = "/nonexistent"
    os.environ.pop("CC", None)
    return statistics()


def cache_that_cannot_be_written(stand_in: gpu_stand_in.StandIn) -> RawOp:
    os.environ["TRITON_CACHE_DIR"] = "/dev/null/cache"  # root may write anywhere else
    return statistics()


def full_disk(stand_in: gpu_stand_in.StandIn) -> RawOp:
    def replace(*paths: Any) -> None:
        raise OSError(28, "No space left on device", str(paths[1]))

    os.replace = replace  # type: ignore[assignment]
    return statistics()


def gpu_without_code(stand_in: gpu_stand_in.StandIn) -> RawOp:
    stand_in.fail(load=209)
    return statistics()


def older_driver(stand_in: gpu_stand_in.StandIn) -> RawOp:
    stand_in.fail(load=222)
    return statistics()


def refusing_assembler(stand_in: gpu_stand_in.StandIn) -> RawOp:
    script = stand_in.folder / "ptxas"
    tool = getattr(knobs.nvidia, "ptxas_blackwell", knobs.nvidia.ptxas)  # sm_90's, in some releases
    script.write_text(REFUSING_PTXAS.format(real=tool.path))
    script.chmod(0o755)
    os.environ.update(TRITON_PTXAS_PATH=str(script), TRITON_PTXAS_BLACKWELL_PATH=str(script))
    return statistics()


def too_many_resources(stand_in: gpu_stand_in.StandIn) -> RawOp:
    triton_reasons.unusable(CPU)  # the probe runs
    stand_in.fail(launch=701)
    return statistics()


def little_shared_memory(stand_in: gpu_stand_in.StandIn) -> RawOp:
    stand_in.fail(shared_memory=1024)
    return product()


def illegal_access(stand_in: gpu_stand_in.StandIn) -> RawOp:
    triton_reasons.unusable(CPU)
    stand_in.fail(launch=700)
    return statistics()


def out_of_memory(stand_in: gpu_stand_in.StandIn) -> RawOp:
    triton_reasons.unusable(CPU)
    stand_in.fail(launch=2)
    return statistics()


FAULTS = (
    *(no_compiler, cache_that_cannot_be_written, full_disk, gpu_without_code, older_driver),
    *(refusing_assembler, too_many_resources, little_shared_memory, illegal_access, out_of_memory),
)


def outcome(fault: Any, folder: Path) -> dict[str, Any]:
    """What was raised, warned and found of two calls with the fault, and whether both gave the reference's result."""
    op = fault(gpu_stand_in.install(str(folder)))
    ops = dispatcher("triton")
    exact = dispatcher("reference")(op)
    raised, same = None, []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            try:
                found = ops(op)
            except RuntimeError as error:
                raised = [str(error), *getattr(error, "__notes__", [])]
                break
            same.append(all(torch.equal(a, e) for a, e in zip(found, exact, strict=True) if a is not None))
    return {
        "fault": fault.__name__,
        "raised": raised,
        "warned": [str(w.message) for w in warned if "fusedres" in str(w.message)],
        "reason": ops.backends[0].reason(op),
        "set_aside": [place.kind.__name__ for place in set_aside.found()],
        "same": same,
    }


def main(folder: Path) -> None:
    for fault in FAULTS:
        work = folder / fault.__name__
        work.mkdir()
        sys.stdout.flush()
        child = os.fork()
        if not child:
            print(json.dumps(outcome(fault, work)), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
