"""What proofs found on this machine, kept beside the user's table: proofs.json.

A record holds for one device, one set of versions and one build of the native library, one dtype and one set of
channels. A file that cannot be read counts as empty, one that cannot be written is said once: proofs are then made
again in every process.
"""

from __future__ import annotations

import json
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fusedres.blocks import machine, user_table
from fusedres.ops.contract import op_name
from fusedres.ops.native import library
from fusedres.ops.reference import REFERENCE
from fusedres.trials.proof_ops import Fault, Question

KIND = "fusedres proofs on this machine"
KINDS = {op_name(kind): kind for kind in REFERENCE.functions}  # the ops' records by name


def path() -> Path:
    return user_table.path().with_name("proofs.json")


def place_of(device: torch.device, backends: tuple[str, ...]) -> dict[str, Any]:
    """Which kernels, on what."""
    file = library.LIBRARY
    build = str(file.stat().st_mtime_ns) if file.exists() else "none"
    drivers = f"driver {machine.driver()}" if device.type == "cuda" else ""
    name = machine.gpu(device) if device.type == "cuda" else machine.processor()
    return {
        "device": name,
        "versions": ", ".join(filter(None, (machine.versions(), drivers))),
        "library": build,
        "backends": list(backends),
    }


def key_of(question: Question) -> dict[str, Any]:
    place = place_of(question.device, question.backends)
    channels = {"narrow": question.narrow, "wide": question.wide}
    dtype = str(question.dtype).removeprefix("torch.")
    return {**place, "dtype": dtype, **channels, "gram": question.gram, "pools": question.pools}


def records() -> list[dict[str, Any]]:
    """Those of the file; [] where it is not there or is something else."""
    try:
        data = json.loads(path().read_text())
    except (OSError, ValueError):
        return []
    is_ours = isinstance(data, dict) and data.get("kind") == KIND and isinstance(data.get("records"), list)
    return [r for r in data["records"] if isinstance(r, dict)] if is_ours else []


def faults_of(question: Question) -> list[Fault] | None:
    """What was found for this question before, or None."""
    wanted = key_of(question)
    for record in records():
        if record.get("key") == wanted:
            try:
                faults = [Fault(*fault) for fault in record["faults"]]
            except (KeyError, TypeError):  # written by hand, or by another version
                return None
            return faults if all(fault.op in KINDS for fault in faults) else None
    return None


def has_clean_run(question: Question) -> bool:
    """Whether such ops were found right on this kind of device before, at whatever channels."""
    wanted = key_of(question)
    kept = [record for record in records() if not record.get("faults", True)]
    channels = {"narrow": question.narrow, "wide": question.wide}
    return any({**record.get("key", {}), **channels} == wanted for record in kept)


def keep(question: Question, faults: list[Fault]) -> None:
    """Adds a record; the file is replaced as a whole, and writers wait for one another."""
    file, wanted = path(), key_of(question)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with user_table.locked(file.parent):
            others = [record for record in records() if record.get("key") != wanted]
            kept = [*others, {"key": wanted, "faults": [list(fault) for fault in faults]}]
            user_table.replace(file, {"kind": KIND, "records": kept})
    except OSError as error:
        warn_unwritable(str(file), str(error))


@cache
def warn_unwritable(file: str, error: str) -> None:
    warnings.warn(
        f"fusedres: {file} cannot be written ({error}), so that what is proved or measured here is found out again in "
        f"every process. Name a folder that can be written in {user_table.ENVIRONMENT_VARIABLE} or XDG_CACHE_HOME.",
        RuntimeWarning,
        stacklevel=2,
    )


def remove() -> bool:
    """Whether there was a file."""
    try:
        os.unlink(path())
    except FileNotFoundError:
        return False
    return True
