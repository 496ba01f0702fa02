"""3x3 convolutions by Winograd's algorithm against oneDNN's direct ones, and their error against the rule's limit.

    python bench/winograd.py [--batch 16] [--rounds 9] [--strict] [--only-errors] > winograd.json

Both take turns. gigaflops: the products of a direct convolution a second; share: of what a large product of matrices
reaches here (`limit`), so that more than 1 is beyond any direct convolution. The errors are of inputs that hurt the
algorithm, each over its limit by `fusedres.ops.accuracy`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from layers import STAGE_SIDES, STAGE_WIDTHS
from torch import Tensor

from fusedres.measuring.timing import comparison, interleave, seconds
from fusedres.ops import selftest
from fusedres.ops.accuracy import error_limit, relative_error
from fusedres.ops.backend import Backend
from fusedres.ops.contract import BnStats, Conv3x3Forward, ConvBackwardInput, ConvBackwardWeight, RawOp
from fusedres.ops.native import functions
from fusedres.ops.reference import REFERENCE

CPU = torch.device("cpu")
WINDOW = (1, 1), (1, 1), (1, 1), 1
# channels and side: of ResNet-18 to -152, of CIFAR's ResNet-20
SHAPES = (*zip(STAGE_WIDTHS, STAGE_SIDES, strict=True), (16, 32), (32, 16), (64, 8))
LIMIT = 0.7  # of the limit: what the errors are to stay below


def random(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def ops(channels: int, side: int, batch: int) -> dict[str, RawOp]:
    """What a training step does with one convolution; the forward with the statistics of its BN."""
    x, dy = random(batch, channels, side, side), random(batch, channels, side, side)
    weight = random(channels, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
    return {
        "forward": Conv3x3Forward(x, weight, save_stats=True),
        "input gradient": ConvBackwardInput(dy, x, weight, *WINDOW),
        "weight gradient": ConvBackwardWeight(dy, x, (3, 3), *WINDOW),
    }


def library(op: RawOp) -> Callable[[], object]:
    """The same by oneDNN, and by the native pass for the statistics."""
    if not isinstance(op, Conv3x3Forward):
        return partial(REFERENCE, op)

    def two_passes() -> object:
        y = torch.conv2d(op.x, op.weight, None, 1, 1)
        return y, functions.backend()(BnStats(y))

    return two_passes


def changed(op: RawOp, change: Callable[[Tensor], Tensor], names: tuple[str, ...]) -> RawOp:
    """The op with other values: of the tensors that it has of those names."""
    return op._replace(**{name: change(getattr(op, name)) for name in names if hasattr(op, name)})  # type: ignore[attr-defined]


HURTING: dict[str, Callable[[RawOp], RawOp]] = {
    "normal": lambda op: op,
    "mean 30": lambda op: changed(op, lambda t: t + 30, ("x",)),
    "outliers": lambda op: changed(op, lambda t: t**5, ("x", "dy")),
    "one of a thousand": lambda op: changed(op, lambda t: t * (torch.randn_like(t) > 3.1), ("x", "dy")),
    "1e-30": lambda op: changed(op, lambda t: t * 1e-15, ("x", "dy", "weight")),
    "low-pass weights": lambda op: changed(op, lambda t: t.abs(), ("weight",)),
}


def errors(backend: Backend, op: RawOp) -> Iterator[tuple[str, float]]:
    """Of each kind of input, the largest error of a result over its limit."""
    for name, change in HURTING.items():
        call = change(op)
        found = backend(call)
        parts = zip(
            *(selftest.tensors(part) for part in (found, *selftest.expected(call, found))), strict=True
        )
        yield (
            name,
            max(relative_error(a, x) / error_limit(relative_error(e, x), a.dtype) for a, x, e in parts),
        )


def multiply_limit() -> float:
    """GFLOP/s of a large product of matrices."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    return float(2 * 1536**3 / min(seconds(lambda: a @ b, CPU) for _ in range(7)) / 1e9)


def timed(op: RawOp, backend: Backend, rounds: int, operations: int, limit: float) -> dict[str, object]:
    found = comparison(*interleave(library(op), lambda: backend(op), CPU, rounds))
    rates = {key: operations / float(found[key]) / 1e9 for key in ("seconds", "baseline_seconds")}  # type: ignore[arg-type]
    return {
        **found,
        "gigaflops": rates["seconds"],
        "share": rates["seconds"] / limit,
        "library_gigaflops": rates["baseline_seconds"],
        "library_share": rates["baseline_seconds"] / limit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--strict", action="store_true", help='as accuracy="strict"')
    parser.add_argument("--only-errors", action="store_true", help="time nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    backend, cells, largest = functions.backend(options.strict), {}, 0.0
    limit = 0.0 if options.only_errors else multiply_limit()
    for channels, side in SHAPES:
        for name, op in ops(channels, side, options.batch).items():
            assert backend.reason(op) is None
            over = dict(errors(backend, op))
            cell: dict[str, object] = {"error_over_limit": over}
            if not options.only_errors:
                operations = 2 * options.batch * side**2 * 9 * channels**2
                cell |= timed(op, backend, options.rounds, operations, limit)
            cells[f"{name}, {channels} at {side}"] = cell
            largest = max(largest, *over.values())
            speed = "" if options.only_errors else f"{cell['ratio']:.2f} times as fast, "
            print(
                f"{name}, {channels} at {side}: {speed}error {max(over.values()):.2f} of its limit",
                file=sys.stderr,
            )
    print(f"largest error over its limit: {largest:.2f}, to stay below {LIMIT}", file=sys.stderr)
    threads = torch.get_num_threads()
    kept = {"torch": torch.__version__, "threads": threads, "batch": options.batch, "strict": options.strict}
    print(json.dumps({**kept, "limit": limit, "largest_error_over_limit": largest, "cells": cells}, indent=1))
    if largest >= LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
