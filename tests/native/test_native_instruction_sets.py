"""The native backend's kernels for either instruction set, whatever this processor has, by the checks of every backend.

Those for AVX-512 emulated; those for AVX2 as they are, which the other tests leave out on a processor with AVX-512.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import native_avx512_build
import pytest

import fusedres
from fusedres.ops.native import library

pytestmark = pytest.mark.skipif(not library.is_built(), reason="no compiled library in this installation")


def run_every_check(capability: str, **environment: str) -> None:
    script = native_avx512_build.ROOT / "tests" / "support" / "native_kernels_run.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), capability],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 300


def test_every_native_op_with_the_kernels_for_avx512():
    run_every_check("avx512", PYTHONPATH=str(native_avx512_build.package()))


def test_every_native_op_with_the_kernels_for_avx2():
    site = Path(fusedres.__file__).parent.parent
    run_every_check("avx2", PYTHONPATH=str(site), ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
