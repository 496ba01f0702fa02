"""The slack that eager PyTorch needs in 16 bits to pass the rule of accuracy against itself, run another way.

    python bench/accuracy_slack.py [--seeds 4] > bench/results/cpu/accuracy_slack.json

Two ways: channels_last on `--threads`, and NCHW on one thread. Every raw op and form of block that the tests have is
run in eager PyTorch in both, on the inputs of the tests and those of other seeds. `slack` is the smallest k with which
`err(B) <= 2*err(A) + k*eps` holds for both orders of ways: the largest over seeds, shapes and values.
`fusedres.ops.accuracy.SLACK` is the largest of all, rounded up to a power of two. What the check of a raw op compares
in float32 is under float32's slack, and is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path += [str(Path(__file__).resolve().parents[1] / "tests" / name) for name in ("support", "zoo")]
import block_accuracy
import raw_op_harness
from block_forms import FORMS, BlockForm
from every_raw_op import CHECKS, cases_of

from fusedres.ops.accuracy import SLACK, relative_error
from fusedres.ops.reference import REFERENCE

LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


class Way(NamedTuple):
    """How eager runs."""

    layout: str
    threads: int


class Need(NamedTuple):
    """The slack that one comparison needs, and where that is."""

    slack: float  # of eps; negative where twice the yardstick is enough
    where: str
    what: str
    error: float
    yardstick: float


Compared = tuple[str, float]  # what, and eager's own error


def compared_by(check: Callable[[Any, Any], None], case: Any) -> list[Compared]:
    """Eager's own error in every comparison in 16 bits that the check makes on the case."""
    found: list[Compared] = []

    def note(actual: Tensor, eager: Tensor, exact: Tensor, what: str = "") -> None:
        if actual.dtype in SLACK and actual.numel():
            eager, exact = (t.detach().nan_to_num(nan=0.0) for t in (eager, exact))
            found.append((what, relative_error(eager, exact)))

    kept = raw_op_harness.assert_as_accurate_as_eager
    raw_op_harness.assert_as_accurate_as_eager = note
    try:
        check(REFERENCE, case)
    finally:
        raw_op_harness.assert_as_accurate_as_eager = kept
    return found


def raw_op_needs(op: str, ways: list[Way], dtype: torch.dtype, seeds: int) -> Iterator[Need]:
    """Of one op, on every case of the tests in a dense layout and for every ordered pair of ways."""
    for case in cases_of(op):
        if case.layout != "channels_last":
            continue
        for seed in range(seeds):
            results = []
            for way in ways:
                torch.set_num_threads(way.threads)
                given = replace(case, id=case.id + "+" * seed, layout=way.layout, dtype=dtype)
                results.append(compared_by(CHECKS[op], given))
            if not any(results) and case.shape[0]:
                return  # an op on vectors, or one that is exact
            for yardsticks, found in permutations(results, 2):
                for (what, own), (_, error) in zip(yardsticks, found, strict=True):
                    slack = (error - 2 * own) / torch.finfo(dtype).eps
                    yield Need(slack, f"{case}, seed {seed}", what, error, own)


def block_needs(form: BlockForm, ways: list[Way], dtype: torch.dtype, seeds: int) -> Iterator[Need]:
    """Of one form of block, as the tests compare it, over several draws, for every ordered pair of ways."""
    for seed in range(seeds):
        block, x, dy = block_accuracy.inputs(form, dtype, seed=seed)
        results = []
        for way in ways:
            torch.set_num_threads(way.threads)
            given, gradient = (t.contiguous(memory_format=LAYOUTS[way.layout]) for t in (x, dy))
            config, units = block_accuracy.read(block, given)
            call = config, given, units, gradient
            eager = block_accuracy.eagerly(*call)
            _, exact = block_accuracy.errors_of(eager, *call)
            drawn = block_accuracy.errors_over_draws(block_accuracy.eagerly, *call, block_accuracy.DRAWS)
            results.append(drawn.relative(exact))
        names = block_accuracy.compared(config, eager)
        for yardsticks, found in permutations(results, 2):
            for what, own, error in zip(names, yardsticks, found, strict=True):
                slack = (error - 2 * own) / torch.finfo(dtype).eps
                yield Need(slack, f"seed {seed}", what, error, own)


def measure(ways: list[Way], seeds: int) -> Iterator[dict[str, Any]]:
    """For each op, form of block and dtype, the comparison that needs the most."""
    sources = [(f"op {op}", partial(raw_op_needs, op)) for op in CHECKS]
    sources += [(f"block {form.name}", partial(block_needs, form)) for form in FORMS]
    for name, needs in sources:
        for dtype in SLACK:
            found = list(needs(ways, dtype, seeds))
            if found:
                most, count = max(found), len(found)
                print(f"{name}, {dtype}: {most}", file=sys.stderr)
                yield {
                    "of": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "compared": count,
                    **most._asdict(),
                }


def rounded_up(slack: float) -> float:
    """The next power of two."""
    return 2.0 ** math.ceil(math.log2(slack)) if slack > 0 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # of variances over one row
    ways = [Way("channels_last", options.threads), Way("nchw", 1)]
    rows = list(measure(ways, options.seeds))
    largest = {
        d: max(row["slack"] for row in rows if row["dtype"] == d) for d in {row["dtype"] for row in rows}
    }
    found = {
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        | {"cpu_capability": torch.backends.cpu.get_cpu_capability()},
        "seeds": options.seeds,
        "ways": [way._asdict() for way in ways],
        "slack": {dtype: {"needed": k, "rounded_up": rounded_up(k)} for dtype, k in largest.items()},
        "rows": sorted(rows, key=lambda row: -row["slack"]),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
