"""Plays a new user who installs a checkout: `make test-install`, or with QUICK=1 the part that CI runs.

Each way of installing runs in a fresh environment that has torch alone, from a path with a space: pip and uv, with
build isolation and without, with a compiler and without, used from the checkout's folder and from elsewhere. With a
compiler the package has its kernels and `auto` fuses; without one it says so in one line, with the line that mends it.

python tests/support/check_install.py [--quick]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from check_package import ROOT, environment_with_torch_of_this_one

LIMIT = 90  # seconds of an installation on two quiet cores, without downloads
WITH_KERNELS = """
import torch, warnings
warnings.simplefilter("error")
import fusedres, fusedres.models
from fusedres.ops.native import library
assert library.is_built() and library.is_usable()
assert torch.ops.fusedres_native.cuda_archs() == "", "code for GPUs that nobody asked for"
block = fusedres.models.BasicBlock(64, 64).to(memory_format=torch.channels_last)
fusedres.patch(block)(torch.randn(16, 64, 56, 56).to(memory_format=torch.channels_last)).sum().backward()
(row,) = fusedres.report(block).blocks
assert row.runs_as == "separate", row
print("kernels found in", library.LIBRARY)
"""
WITHOUT_KERNELS = """
import torch, warnings
import fusedres, fusedres.models
from fusedres.ops.native import library
assert not library.is_built()
block = fusedres.models.BasicBlock(64, 64)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        fusedres.patch(block)
(message,) = [str(w.message) for w in said]
assert "\\n" not in message and "no compiled kernels" in message, message
assert "a C++ compiler (absent-cxx) not found" in message and "pip install" in message, message
block(torch.randn(2, 64, 6, 6))
(row,) = fusedres.report(block).blocks
assert row.code == "native_missing" and "fusedres doctor" in str(fusedres.report(block)), row
print("without kernels:", message)
"""


class Way(NamedTuple):
    """One way of installing: the front end's command, and whether a compiler is there."""

    name: str
    command: tuple[str, ...]
    compiler: bool = True


PIP, UV = (
    ("{python}", "-m", "pip", "install", "--no-deps"),
    ("{uv}", "pip", "install", "--no-deps", "--python", "{python}"),
)
BARE = "--no-build-isolation"
NEEDED = "setuptools>=77"
WAYS = (
    Way("pip", PIP),
    Way("pip without a compiler", PIP, compiler=False),
    Way("pip without isolation", (*PIP, BARE)),
    Way("pip without isolation or a compiler", (*PIP, BARE), compiler=False),
    Way("uv", UV),
    Way("uv without a compiler", UV, compiler=False),
    Way("uv without isolation", (*UV, BARE)),
    Way("uv without isolation or a compiler", (*UV, BARE), compiler=False),
)
QUICK = WAYS[:2]


def environment(compiler: bool) -> dict[str, str]:
    """Of a user's shell: no settings of ours, and nothing of the environment that this script runs in."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDRES_") and k != "PYTHONPATH"}
    return kept if compiler else {**kept, "CXX": "absent-cxx"}


def checkout(folder: Path) -> Path:
    """The files of this working tree that a clone would have, in a folder of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def old_setuptools_is_named(
    python: Path, command: list[str], source: Path, folder: Path, shell: dict[str, str]
) -> None:
    """Without isolation the environment's own setuptools builds: one that is too old or absent is named at once."""
    query = "import setuptools; print(setuptools.__version__)"
    found = subprocess.run([python, "-c", query], capture_output=True, text=True).stdout.strip()
    if found and int(found.split(".")[0]) >= 77:
        return
    done = subprocess.run([*command, str(source)], cwd=folder, env=shell, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    if found:
        assert f"needs {NEEDED} and found {found}" in said and f'pip install "{NEEDED}"' in said, said


def check(way: Way, source: Path, folder: Path) -> None:
    """Installs in a fresh environment, then uses the package from the checkout's folder and from elsewhere."""
    python = environment_with_torch_of_this_one(folder / "environment")
    command = [part.format(python=python, uv=shutil.which("uv") or "uv") for part in way.command]
    shell = environment(way.compiler)
    if BARE in way.command:
        old_setuptools_is_named(python, command, source, folder, shell)
        subprocess.run([python, "-m", "pip", "install", "--quiet", NEEDED], check=True)
    start = time.monotonic()
    done = subprocess.run(
        [*command, "-v", str(source)], cwd=folder, env=shell, capture_output=True, text=True
    )
    seconds = time.monotonic() - start
    assert done.returncode == 0, f"{way.name}: {done.stdout}{done.stderr}"
    if way.compiler:
        assert "fusedres: compile " in done.stdout + done.stderr, (
            f"{way.name}: no line of progress\n{done.stdout}"
        )
    for place in (source, folder):
        script = WITH_KERNELS if way.compiler else WITHOUT_KERNELS
        subprocess.run([python, "-c", script], cwd=place, env=shell, check=True)
    late = f", more than the {LIMIT} of two quiet cores" if seconds > LIMIT else ""
    print(f"{way.name}: installed in {seconds:.0f} s{late}", flush=True)


def main(ways: tuple[Way, ...]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "a path with spaces"
        source = checkout(out / "fusedres checkout")
        for i, way in enumerate(ways):
            (out / str(i)).mkdir()
            check(way, source, out / str(i))


if __name__ == "__main__":
    main(QUICK if "--quick" in sys.argv[1:] else WAYS)
