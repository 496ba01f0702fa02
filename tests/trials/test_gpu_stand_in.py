"""A GPU's trial without one: the verdict follows the times of its events, which nobody waits for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    script = ROOT / "tests" / "support" / "gpu_stand_in_trials.py"
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "bench")))
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("trials"))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_block_goes_on_trial_under_autocast(found):
    assert {code.partition(":")[0] for code in found["device-bound"]["first"]} == {"measuring"}


def test_where_the_host_is_the_limit_the_original_forward_stays(found):
    assert set(found["host-bound"]["runs_as"].values()) == {"unfused"}
    assert all(code.startswith("no_faster_recipe") for code in found["host-bound"]["codes"])


def test_where_the_device_is_the_limit_bottlenecks_run_gram(found):
    runs_as = found["device-bound"]["runs_as"]
    assert runs_as.pop("stem") == "separate" and set(runs_as.values()) == {"gram"}
    assert found["device-bound"]["codes"] == ["None"]


def test_events_are_never_waited_for(found):
    assert found["events"] > 500 and found["waited_for"] == 0
