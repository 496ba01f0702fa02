"""The list of wrong patchers is sound, and a few of them are tried; `make mutants` tries all."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS

TESTS = Path(__file__).parents[1]
FEW = ("ignores_hooks_of_submodules", "caches_the_weights", "loses_reduce")


@pytest.mark.parametrize("name", MUTANTS)
def test_the_named_test_exists(name):
    file, *_, test = MUTANTS[name][0].split("::")
    assert re.search(rf"def {test.partition('[')[0]}\(", (TESTS / file).read_text())


def test_a_few_are_caught():
    command = [sys.executable, "-P", str(TESTS / "support" / "mutants.py"), *FEW]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_sound_patcher_is_not_caught():
    """The runner fails where a test passes: here because nothing is changed."""
    code = (
        "import sys, mutants; name = 'keeps_eps'; test, _ = mutants.MUTANTS[name]\n"
        "mutants.MUTANTS[name] = test, lambda: None\n"
        "sys.argv[1:] = [name]; sys.exit(mutants.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS / "support")
    assert done.returncode == 1 and "MISSED  keeps_eps" in done.stdout, done.stdout + done.stderr
