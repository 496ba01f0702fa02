"""Every program in examples/ runs at a tiny size, and what it prints says that blocks ran fused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = ("--batch", "2", "--size", "32", "--recipe", "separate")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
RUNS: dict[
    str, tuple[tuple[str, ...], tuple[str, ...], str]
] = {  # launcher, further options, what is printed
    "train.py": ((), ("--steps", "2"), "matched 9 of 9 blocks"),
    "train.py, amp": ((), ("--steps", "1", "--amp"), "matched 9 of 9 blocks"),
    "distributed.py": (TORCHRUN, (), "matched 9 of 9 blocks"),
    "distributed.py, fsdp": (TORCHRUN, ("--fsdp",), "matched 9 of 9 blocks"),
    "serve.py": ((), ("--requests", "2"), "matched 9 of 9 blocks"),
    "compiled.py": ((), ("--compiler", "aot_eager"), "relative distance from eager"),
    "finetune_transformers.py": ((), ("--steps", "1"), "step 0: loss"),
    "is_it_faster.py": (
        (),
        ("--rounds", "5", "--tune", "--model", "cifar_resnet20"),
        "blocks that ran fused",
    ),
}


def test_every_example_is_run():
    assert {file.name for file in EXAMPLES.glob("*.py")} == {name.partition(",")[0] for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_the_example(name):
    launcher, options, printed = RUNS[name]
    command = [sys.executable, *launcher, str(EXAMPLES / name.partition(",")[0]), *TINY, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert printed in done.stdout
    if "matched" in done.stdout:
        assert " separate" in done.stdout and "unfused" not in done.stdout
