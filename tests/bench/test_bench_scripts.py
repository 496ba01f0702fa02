"""Each benchmark that uses the tests' helpers finds them when it is run as a script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
SCRIPTS = sorted(file.name for file in BENCH.glob("*.py") if "sys.path" in file.read_text())


def test_there_are_some():
    assert {"accuracy_slack.py", "block_sizes.py", "report.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_says_how_it_is_used(script):
    done = subprocess.run([sys.executable, str(BENCH / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr
