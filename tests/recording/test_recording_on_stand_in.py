"""On a GPU's path every pass of a ResNet is replayed, launches the same kernels, and costs the host less."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedres.ops.native import library

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not library.is_loaded(), reason="the compiled kernels are not built")
ROOT = Path(__file__).parents[2]
CASES = "separate", "gram"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    script = ROOT / "tests" / "support" / "gpu_stand_in_replays.py"
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "bench")))
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path_factory.mktemp("replays") / "cache")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_every_pass_has_a_recording(found, case):
    """17 blocks, forward and backward, of which equal ones share theirs."""
    of_case = found[case]
    assert of_case["problems"] == []
    assert of_case["without_recording"] == 0
    assert of_case["passes"] > 10


@pytest.mark.parametrize("case", CASES)
def test_a_replay_launches_the_same_kernels(found, case):
    by_python, replayed = found[case]["launches"]
    assert by_python == replayed
    assert (by_python > 0) == (case == "gram")  # the kernels of the others are the native library's


@pytest.mark.parametrize("case", CASES)
def test_a_replayed_step_costs_the_host_less(found, case):
    low, high = found[case]["ratio"]
    assert low <= high < 1
