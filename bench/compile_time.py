"""What compiling a network's Triton kernels costs from an empty cache, on the stand-in for a GPU.

    python bench/compile_time.py [--network resnet50] [--recipe gram] [--rounds 3] > compile_time.json

In first steps, one kernel after the other, and by `fusedres.warmup`, on one core and on all; each in a process of its
own, in turns. The channels are the real ones, for kernels are compiled for channels; images are small, for nothing of
their size is. bfloat16 autocast, training and inference. Kernels are compiled for sm_90, in the time of this CPU.

`runnable` says how many threads ran or waited for a core, on average: on a machine that is shared with others the
wall time says little of how the work was spread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

STEPS, WARMUP = "first steps", "warmup"
BATCH, SIZE = 2, 32


def cpu_seconds() -> float:
    """Of this process and of those that it ran and waited for, such as the assembler."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def runnable_seconds() -> float:
    """How long this thread ran or waited for a core."""
    ran, waited, _ = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    return (int(ran) + int(waited)) / 1e9


def measure(way: str, network: str, recipe: str) -> dict[str, Any]:
    """In this process, which is used up by it."""
    import gpu_stand_in
    import torch
    import torch.nn.functional as F
    from triton import knobs

    import fusedres
    from fusedres import models

    torch.set_num_threads(1)
    stand_in = gpu_stand_in.install()
    torch.manual_seed(0)
    model = models.create(network).to(memory_format=torch.channels_last)
    fusedres.patch(model, recipe=recipe)
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    kernels: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    runnable: dict[int, float] = {}  # of each thread that compiles

    def listen(*, src: Any, times: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            kernels[src.fn.__name__] += 1
            seconds[src.fn.__name__] += times.total / 1e6
            runnable[threading.get_native_id()] = runnable_seconds()

    def warm(training: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
            fusedres.warmup(model.train(training), images)

    def step(training: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
            logits = model.train(training)(images)
        if training:
            F.cross_entropy(logits.float(), torch.arange(BATCH)).backward()

    knobs.compilation.listener = listen
    began, cpu, wall = runnable_seconds(), cpu_seconds(), time.perf_counter()
    for training in (True, False):
        (warm if way == WARMUP else step)(training)
    runnable[threading.get_native_id()] = runnable_seconds() - began
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    found = {"cubins": stand_in.cubins, "cpu_seconds": cpu, "seconds": wall}
    found["runnable"] = sum(runnable.values()) / wall
    return {**found, "kernels": {name: [kernels[name], seconds[name]] for name in sorted(kernels)}}


def in_process(way: str, cores: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Of a process that may run on these cores alone."""
    command = [
        sys.executable,
        __file__,
        "--network",
        options.network,
        "--recipe",
        options.recipe,
        "--way",
        way,
    ]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),  # no thread runs here
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--recipe", default="gram")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=(STEPS, WARMUP), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.network, options.recipe)))
        return
    import triton

    from fusedres.blocks.machine import versions

    cores = sorted(os.sched_getaffinity(0))
    ways = [(STEPS, cores), (WARMUP, cores[:1]), *([(WARMUP, cores)] if len(cores) > 1 else [])]
    rounds: list[list[dict[str, Any]]] = []
    for i in range(options.rounds):
        rounds.append([in_process(way, on, options) for way, on in ways])
        print(f"round {i + 1} of {options.rounds}", file=sys.stderr)
    rows = []
    for (way, on), found in zip(ways, zip(*rounds, strict=True), strict=True):
        row: dict[str, Any] = {"way": way, "cores": len(on), "cubins": found[0]["cubins"]}
        for name in ("cpu_seconds", "seconds", "runnable"):
            row[name] = round(median(f[name] for f in found), 2)
            row[f"all_{name}"] = [round(f[name], 2) for f in found]
        rows.append(row)
    kernels = {
        name: {"cubins": count, "seconds": round(median(r[0]["kernels"][name][1] for r in rounds), 2)}
        for name, (count, _) in rounds[0][0]["kernels"].items()
    }
    where = {"network": options.network, "recipe": options.recipe, "triton": triton.__version__}
    json.dump({**where, "versions": versions(), "rows": rows, "kernels": kernels}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
