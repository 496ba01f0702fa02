"""`warmup` on the stand-in for a GPU, where kernels are really compiled: what each case comes to, as a line of JSON.

Run as a script, in a process of its own; each case has a fork, and those of a process group one for each rank.
`tests/measuring/test_warmup_on_stand_in.py` reads the lines.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import gpu_stand_in
import gpu_stand_in_faults as faults
import torch
import torch.distributed as dist
from torch import nn
from triton import knobs

import fusedres
from fusedres.models import BasicBlock
from fusedres.ops import set_aside, triton_reasons
from fusedres.triton_kernels import launchers  # noqa: F401  once, ahead of all forks

PROBE = "probe_kernel"
RANKS = 2


def model_and_input(training: bool = False) -> tuple[nn.Module, torch.Tensor]:
    """In evaluation mode and without gradients three kernels are needed, in training mode those of statistics too."""
    torch.manual_seed(0)
    model = fusedres.patch(nn.Sequential(BasicBlock(8, 8)), recipe="separate", backend="triton")
    return model.train(training), torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)


def warmed(stand_in: gpu_stand_in.StandIn, model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """What a warmup compiled, by whom, told, warned and raised; and what a step compiles after it."""
    compiled: list[tuple[str, bool]] = []
    told: list[tuple[Any, ...]] = []

    def listen(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            compiled.append((src.fn.__name__, threading.current_thread().name.startswith("fusedres-compile")))

    def tell(what: str, done: int, total: int) -> None:
        told.append((what, done, total, stand_in.launches))

    knobs.compilation.listener = listen
    raised = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            with torch.no_grad():
                fusedres.warmup(model, x, progress=tell)
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"
        before = len(compiled)
        if raised is None:
            with torch.no_grad():
                model(x)
    return {
        "compiled": sorted(name for name, _ in compiled[:before] if name != PROBE),
        "by_the_pool": all(in_pool for name, in_pool in compiled[:before] if name != PROBE),
        "after": [name for name, _ in compiled[before:]],
        "told": told,
        "warned": [str(w.message) for w in warned if "fusedres" in str(w.message)],
        "set_aside": [place.kind.__name__ for place in set_aside.found()],
        "raised": raised,
    }


def full_disk_after_the_probe(stand_in: gpu_stand_in.StandIn) -> None:
    triton_reasons.unusable(faults.CPU)
    faults.full_disk(stand_in)


CASES: tuple[Callable[[gpu_stand_in.StandIn], Any], ...] = (
    faults.no_compiler,
    faults.cache_that_cannot_be_written,
    faults.refusing_assembler,
    full_disk_after_the_probe,
)


def alone(case: Callable[[gpu_stand_in.StandIn], Any], folder: Path) -> dict[str, Any]:
    stand_in = gpu_stand_in.install(str(folder))
    case(stand_in)
    return {"case": case.__name__, **warmed(stand_in, *model_and_input(case is faults.refusing_assembler))}


def in_group(rank: int, folder: Path) -> dict[str, Any]:
    """Of one rank of two: a warmup, and what another one raises where the model of rank 0 does."""
    own = folder / f"rank{rank}"
    own.mkdir()
    os.environ.update(TRITON_CACHE_DIR=str(folder / "cache"), LOCAL_RANK=str(rank))
    stand_in = gpu_stand_in.install(str(own))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=100),
    )
    model, x = model_and_input()
    found = warmed(stand_in, model, x)
    dist.barrier()
    if rank == 0:
        model.register_forward_hook(lambda *args: 1 / 0)
    failed = warmed(stand_in, model.train(), x)["raised"]  # kernels of statistics wait for the pool by then
    dist.barrier()
    dist.destroy_process_group()
    return {"case": "group", "rank": rank, **found, "failed": failed}


def forked(run: Callable[[], dict[str, Any]]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            os.write(1, (json.dumps(run()) + "\n").encode())  # at once: ranks share the pipe
        finally:
            os._exit(0)
    return child


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for case in CASES:
        work = folder / case.__name__
        work.mkdir()
        os.waitpid(forked(lambda case=case, work=work: alone(case, work)), 0)
    work = folder / "group"
    work.mkdir()
    for child in [forked(lambda rank=rank: in_group(rank, work)) for rank in range(RANKS)]:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
