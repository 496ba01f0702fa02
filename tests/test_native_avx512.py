"""The AVX-512 kernels of the native backend, emulated, by the checks that every backend has to pass."""

import os
import re
import subprocess
import sys

import native_avx512_build
import pytest

from fusedres.backends import native

pytestmark = pytest.mark.skipif(not native.is_built(), reason="no compiled library in this installation")


def test_every_native_op_with_the_kernels_for_avx512():
    site = native_avx512_build.package()
    run = native_avx512_build.ROOT / "tests" / "native_avx512_run.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(run), "avx512"],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 300
