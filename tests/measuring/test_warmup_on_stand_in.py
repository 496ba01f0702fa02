"""warmup where kernels are really compiled, on the stand-in for a GPU: by a pool, with faults, by one of two ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
FORWARD = ["bn_add_relu_forward_kernel", "bn_add_relu_forward_kernel", "bn_scale_shift_kernel"]
MOMENTS = ["finish_moments_kernel", "merge_moments_kernel"]  # of the statistics, next to bn_stats_kernel
UNUSABLE = {"no_compiler": "install a C compiler", "cache_that_cannot_be_written": "set TRITON_CACHE_DIR"}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What each case came to, by its name and, of a process group, the rank."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build the stand-in with")
    script = ROOT / "tests" / "support" / "gpu_stand_in_warmups.py"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "FUSEDRES_"))}
    paths = os.pathsep.join((str(ROOT), str(ROOT / "bench"), str(ROOT / "tests" / "support")))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path_factory.mktemp("warmups"))],
        env={**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert len(found) == 6, done.stderr[-2000:]
    return {(line["case"], line.get("rank")): line for line in found}


def test_the_pool_compiles_every_kernel_and_launches_none(lines):
    found = lines["group", 0]
    assert found["compiled"] == FORWARD and found["by_the_pool"] and not found["after"]
    total = len(found["told"])
    probe = 1
    assert found["told"] == [["compiling kernels", done, total, probe] for done in range(1, total + 1)]
    assert total >= len(FORWARD) and found["raised"] is None and not found["warned"]


@pytest.mark.parametrize("case", UNUSABLE)
def test_where_nothing_can_be_compiled_nothing_is_planned(case, lines):
    found = lines[case, None]
    assert not found["compiled"] and not found["told"] and found["raised"] is None
    (warning,) = found["warned"]
    assert "runs no kernel" in warning and UNUSABLE[case] in warning


def test_a_kernel_that_cannot_be_compiled_is_set_aside_by_the_step(lines):
    """With the one warning that it always had; the others were compiled ahead."""
    found = lines["refusing_assembler", None]
    assert found["compiled"] == FORWARD + MOMENTS
    (warning,) = found["warned"]
    assert "bn_stats" in warning and found["set_aside"] == ["BnStats"] and found["raised"] is None


def test_a_disk_that_fills_up_is_said_once_for_each_op(lines):
    found = lines["full_disk_after_the_probe", None]
    assert not found["compiled"] and found["raised"] is None
    assert len(found["warned"]) == len(found["set_aside"]) == 2
    assert all("No space left" in warning for warning in found["warned"])


def test_the_first_rank_compiles_and_the_other_finds_it_done(lines):
    first, second = (lines["group", rank] for rank in (0, 1))
    assert first["compiled"] == FORWARD and first["by_the_pool"]
    assert not second["compiled"] and not second["told"]
    assert all(not line["after"] and line["raised"] is None for line in (first, second))


def test_an_error_of_the_rank_that_compiles_reaches_the_others(lines):
    first, second = (lines["group", rank]["failed"] for rank in (0, 1))
    assert first == "ZeroDivisionError: division by zero"
    assert "failed on rank 0 of 2: ZeroDivisionError" in second and "see that rank's output" in second
