"""What a training step on a GPU's path costs the host, in eager's time: the upper 95 % bound, on this machine.

Run by `make bench-check`.
"""

import json
import subprocess
import sys

import host_time
import pytest

from fusedres.measuring.timing import bootstrap_interval, median

pytest.importorskip("triton")
pytestmark = pytest.mark.speed
LIMITS = {"separate": 0.9, "gram": 1.1}


@pytest.fixture(scope="module")
def ratios():
    command = [sys.executable, "-W", "ignore", host_time.__file__, *LIMITS]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(shown.splitlines()[-1])


@pytest.mark.parametrize("recipe", LIMITS)
def test_a_step_costs_the_host_no_more_than_its_share_of_eagers(ratios, recipe):
    low, high = bootstrap_interval(ratios[recipe])
    assert high <= LIMITS[recipe], f"{recipe}: {median(ratios[recipe]):.3f} [{low:.3f} {high:.3f}]"
