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


LIMITS = [({}, True), ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, False), ({"DNNL_MAX_CPU_ISA": "avx512_core"}, True)]


@pytest.mark.parametrize(("limit", "wider"), LIMITS, ids=["unlimited", "avx2", "avx512"])
def test_direct_products_are_left_to_a_wider_onednn(limit, wider):
    """torch is held to AVX2; oneDNN takes what the processor has, where its own variable does not hold it."""
    program = (
        "from fusedres.ops.native import library, reasons, winograd;"
        "print(library.onednn_is_wider(), len(reasons.product_dtypes()), winograd.fewest_channels())"
    )
    kept = {k: v for k, v in os.environ.items() if not k.endswith("_MAX_CPU_ISA")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**kept, "ATEN_CPU_CAPABILITY": "avx2", **limit},
        capture_output=True,
        text=True,
        check=True,
    )
    processor = Path("/proc/cpuinfo").read_text()
    zen4 = "AuthenticAMD" in processor and re.search(
        r"cpu family\s*: 25\n", processor
    )  # multiplies in two halves
    wider = wider and "avx512dq" in processor and not zen4
    assert done.stdout.split() == (["True", "0", "32"] if wider else ["False", "1", "16"])
