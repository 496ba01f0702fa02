"""Triton's kernels without a GPU: the files `triton_interpreted_*.py`, each in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, and the interpreted backend must not serve the CPU tensors
of the other tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SUPPORT = Path(__file__).parents[1] / "support"
FILES = sorted(SUPPORT.glob("triton_interpreted_*.py"))


MARKED = [
    pytest.param(file, id=file.stem, marks=[pytest.mark.mutant] if "planted_bugs" in file.stem else [])
    for file in FILES
]


@pytest.mark.parametrize("file", MARKED)
def test_interpreted(file):
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-x",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        str(file),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parent.parent)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
