"""What this installation is and does on this machine: versions, devices, backends, a self-test, what to install.

`examine()` gathers it as plain data, `text` lays it out, `run` prints it: `fusedres doctor`. It needs torch alone, for
one runs it where something is missing.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fusedres.blocks.choice import TABLE
from fusedres.errors import BackendUnavailableError
from fusedres.ops import selftest
from fusedres.ops.cases import SMALL, cases
from fusedres.ops.dispatch import check_backend, dispatcher
from fusedres.ops.native import library
from fusedres.ops.selftest import Outcome
from fusedres.text_table import section
from fusedres.trials import registry

BACKENDS = ("native", "triton", "reference")


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def versions() -> dict[str, str | None]:
    """Of everything that a bug report needs; None: not there."""
    return {
        "fusedres": package_version("fusedres"),
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
        "cuDNN": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
        "triton": package_version("triton"),
        "python": platform.python_version(),
        "system": f"{platform.platform()}, {' '.join(platform.libc_ver())}",
    }


def unavailable(backend: str) -> str | None:
    """Why a backend is absent from this installation, or None."""
    try:
        check_backend(backend)
    except BackendUnavailableError as error:
        return str(error)
    return None


def native_library() -> dict[str, Any]:
    """Where the library is, whether it loads, and what it says of itself; None where it cannot be asked."""
    problem = unavailable("native")
    ask = None if problem else torch.ops.fusedres_native
    return {
        "path": str(library.LIBRARY),
        "problem": problem,
        "cpu_kernels": ask.cpu_capability() if ask else None,
        "cuda_archs": ask.cuda_archs() if ask else None,
        "cuda_version": ask.cuda_version() if ask else None,
    }


def gpus() -> list[dict[str, Any]]:
    """Every CUDA device; `problem`: why the native library has no code for it, None if it has."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        problem = unavailable("native")
        problem = problem or torch.ops.fusedres_native.cuda_device_problem(index) or None
        found.append(
            {
                "index": index,
                "name": properties.name,
                "arch": f"sm_{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "native_code": problem is None,
                "problem": problem,
            }
        )
    return found


def machine() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus(),
    }


def serving() -> list[dict[str, str]]:
    """For each device, dtype and form of an op, the backend that serves a channels_last call of an ordinary block."""
    rows = []
    for device in selftest.devices():
        for dtype in selftest.DTYPES:
            row = {"device": str(device), "dtype": dtype_name(dtype)}
            for case in cases(SMALL[-1], dtype, device):
                row[case.name] = dispatcher().serving(case.op).name
            rows.append(row)
    return rows


def recipe_table() -> list[dict[str, Any]]:
    """What `recipe="auto"` takes: every entry of the measured table, as it is."""
    return [
        {
            "device": device,
            "backend": backend,
            "dtype": dtype_name(dtype),
            "gradients": gradients,
            **entry._asdict(),
        }
        for (device, backend, dtype, gradients), entries in TABLE.items()
        for entry in entries
    ]


def summary(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """For each backend, device and dtype: calls that passed, problems, and reasons for not serving a call."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for o in outcomes:
        where = {"backend": o.backend, "device": o.device, "dtype": o.dtype}
        empty = {**where, "passed": 0, "problems": [], "unserved": Counter()}
        row = rows.setdefault((o.backend, o.device, o.dtype), empty)
        if o.unserved is not None:
            row["unserved"][o.unserved] += 1
        elif o.problem is not None:
            row["problems"].append(f"{o.case}: {o.problem}")
        else:
            row["passed"] += 1
    return list(rows.values())


def own_archs() -> list[str]:
    """Compute capabilities of the GPUs that a CUDA build of torch sees here, such as ["90"]."""
    return sorted({gpu["arch"].removeprefix("sm_") for gpu in gpus()}) if torch.version.cuda else []


def install_line() -> str:
    """The command that builds and installs, in a checkout, what this machine can use."""
    archs = own_archs()
    build = f'FUSEDRES_BUILD=cuda FUSEDRES_CUDA_ARCHS="{";".join(archs)}"' if archs else "FUSEDRES_BUILD=cpu"
    return f"{build} pip install ."


def wheel_name() -> str:
    """The smallest wheel that serves this machine; the one without a local version serves every GPU."""
    archs = own_archs()
    local = f"+cu*.{'.'.join(f'sm{arch}' for arch in archs)}" if archs else ""
    return f"fusedres-{(package_version('fusedres') or '*').partition('+')[0]}{local}-py3-none-*_x86_64.whl"


def advice() -> list[str]:
    """What to do about what was found; empty: nothing."""
    said = []
    if unavailable("native"):
        said.append(
            f"the native backend is absent; to have it: {install_line()}, or the wheel {wheel_name()}"
        )
    elif any(not gpu["native_code"] for gpu in gpus()):
        said.append(
            f"the native library does not run on every GPU here; to have that: {install_line()}, "
            f"or the wheel {wheel_name()}"
        )
    if torch.cuda.is_available() and package_version("triton") is None:
        said.append('the Triton backend is absent; to have it: pip install "fusedres[triton]"')
    if package_version("typer") is None:
        said.append('the other commands need typer; to have it: pip install "fusedres[cli]"')
    return said


def examine() -> dict[str, Any]:
    """Everything, as plain data; `passed` is False where the self-test found a wrong result.

    Raises:
        BackendUnavailableError: FUSEDRES_BACKEND names a backend that is not there.
    """
    in_use = [backend.name for backend in dispatcher().backends]
    tested = summary(selftest.run())
    return {
        "versions": versions(),
        "machine": machine(),
        "native_library": native_library(),
        "backends": {name: unavailable(name) for name in BACKENDS},
        "backends_in_use": in_use,
        "serving": serving(),
        "recipe_table": recipe_table(),
        "trials": registry.summary(),
        "selftest": tested,
        "install": install_line(),
        "wheel": wheel_name(),
        "advice": advice(),
        "passed": not any(row["problems"] for row in tested),
    }


def pairs(title: str, values: dict[str, Any]) -> str:
    shown = ((key, "-" if value in (None, "") else str(value)) for key, value in values.items())
    return section(title, ((key.replace("_", " "), value) for key, value in shown))


def serving_text(rows: list[dict[str, str]]) -> str:
    """One line for each form of an op, one column for each device and dtype."""
    heads = ("op", *(f"{row['device']} {row['dtype']}" for row in rows))
    names = dict.fromkeys(key for row in rows for key in row if key not in ("device", "dtype"))
    lines = [heads, *((name, *(row[name] for row in rows)) for name in names)]
    notes = ["reference: plain PyTorch, with its libraries' kernels."]
    if any("native" in row.values() for row in rows):
        notes.append("Of convolutions native leaves sizes to the library at which that is as fast.")
    return section("which backend serves an op at an ordinary block's channels, channels_last", lines, *notes)


def recipe_table_text(entries: list[dict[str, Any]]) -> str:
    """One line an entry, its conditions by name; where they were measured below."""
    title = "recipe='auto' takes, where the user's own table names nothing"
    if not entries:
        return f"{title}: what trials find, unless a recipe is asked for"
    heads = ("recipe", "device", "backend", "dtype", "gradients", "from elements of x", "from channels")
    columns = ("recipe", "device", "backend", "dtype")
    rows = [
        (
            *(str(entry[column]) for column in columns),
            "wanted" if entry["gradients"] else "none",
            f"{entry['least_elements']:,}",
            str(entry["least_channels"]),
        )
        for entry in entries
    ]
    places = dict.fromkeys(entry["where"] for entry in entries)
    return section(title, [heads, *rows], *(f"measured on {place}" for place in places))


def selftest_text(rows: list[dict[str, Any]]) -> str:
    """One line a backend, device and dtype, and one below them all for each problem."""
    heads = ("backend", "where", "passed", "wrong", "not served")
    lines, problems = [heads], []
    for row in rows:
        unserved = ", ".join(f"{count} {reason}" for reason, count in row["unserved"].items())
        where = f"{row['device']} {row['dtype']}"
        lines.append((row["backend"], where, str(row["passed"]), str(len(row["problems"])), unserved))
        problems += [f"wrong: {row['backend']}, {where}: {problem}" for problem in row["problems"]]
    return section("self-test: error against float64, held to twice eager's own", lines, *problems)


def text(found: dict[str, Any]) -> str:
    """What `examine` found, for a person."""
    sections = [
        pairs("versions", found["versions"]),
        pairs("machine", {k: v for k, v in found["machine"].items() if k != "gpus"}),
    ]
    for gpu in found["machine"]["gpus"]:
        code = {"contains code for your GPU": "yes" if gpu["native_code"] else "no"}
        sections.append(pairs(f"cuda:{gpu['index']}", {"GPU": gpu["name"], **code, **gpu}))
    sections += [
        pairs("native library", found["native_library"]),
        pairs("backends", {k: v or "present" for k, v in found["backends"].items()}),
        serving_text(found["serving"]),
        recipe_table_text(found["recipe_table"]),
        pairs("recipes on trial, where no table is for a call", found["trials"]),
        selftest_text(found["selftest"]),
    ]
    if found["advice"]:
        sections.append("\n".join(["to install", *(f"  {line}" for line in found["advice"])]))
    return "\n\n".join([*sections, "the self-test passed" if found["passed"] else "the self-test FAILED"])


def run(as_json: bool) -> int:
    """Prints everything; returns the exit code: 1 if a result is wrong or FUSEDRES_BACKEND names an absent backend."""
    try:
        found = examine()
    except BackendUnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2) if as_json else text(found))
    return 0 if found["passed"] else 1
