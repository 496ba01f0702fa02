"""A proof in a process of its own: both ends of it.

`python -m fusedres.trials.proof_process` reads a question as JSON and writes a line ahead of each op, the faults last.
A process that dies has named the op that it died in; it is asked again without that op.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fusedres.ops.dispatch import LOADERS
from fusedres.trials.proof_ops import Fault, Question, answer

COMMAND = (sys.executable, "-m", "fusedres.trials.proof_process")
MOST_SECONDS = 900  # kernels are compiled in it
MOST_CRASHES = 8


def as_plain(question: Question, skipped: list[Fault]) -> dict[str, Any]:
    return {
        **question._asdict(),
        "device": str(question.device),
        "dtype": str(question.dtype).removeprefix("torch."),
        "skipped": [[fault.backend, fault.op] for fault in skipped],
    }


def from_plain(data: dict[str, Any]) -> tuple[Question, set[tuple[str, str]]]:
    skipped = {(backend, op) for backend, op in data.pop("skipped")}
    device, dtype = torch.device(data["device"]), getattr(torch, data["dtype"])
    parts = {"device": device, "dtype": dtype, "backends": tuple(data["backends"])}
    return Question(**{**data, **parts}), skipped


def environment() -> dict[str, str]:
    """In which the process finds this very package."""
    folder = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (folder, known)))}


def ask_in_process(question: Question) -> list[Fault] | str:
    """The faults; or why the process could not even begin."""
    died: list[Fault] = []
    while True:
        asked = json.dumps(as_plain(question, died))
        try:
            done = subprocess.run(
                COMMAND,
                input=asked,
                capture_output=True,
                text=True,
                timeout=MOST_SECONDS,
                env=environment(),
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{type(error).__name__}: {error}"
        said = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        how = f"{how_it_ended(done.returncode)}: {said}"
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        last = lines[-1] if lines else {}
        if "faults" in last:
            return [*died, *(Fault(*fault) for fault in last["faults"])]
        if "begin" not in last or len(died) >= MOST_CRASHES:
            return how
        backend, op = last["begin"]
        died.append(Fault(backend, op, f"a process that ran it {how}"))


def how_it_ended(code: int) -> str:
    """In words, from a return code."""
    if code >= 0:
        return f"ended with {code}"
    names = {int(s): s.name for s in signal.Signals}
    return f"was killed by {names.get(-code, -code)}"


def main() -> None:
    question, skipped = from_plain(json.load(sys.stdin))

    def begin(backend: str, op: str) -> None:
        print(json.dumps({"begin": [backend, op]}), flush=True)

    backends = tuple(LOADERS[name]() for name in question.backends)
    faults = answer(question, backends, lambda *place: place in skipped, begin)
    if question.device.type == "cuda":
        torch.cuda.synchronize(question.device)  # an illegal access is said no later than here
    print(json.dumps({"faults": [list(fault) for fault in faults]}), flush=True)


if __name__ == "__main__":
    main()
