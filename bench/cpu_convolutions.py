"""Convolutions on a CPU: the native kernels against the library's, at every shape of ResNet-50's and -18's blocks.

    python bench/cpu_convolutions.py [--batch 16] [--dtype float32] [--rounds 9] > convolutions_float32.json

Both take turns. `ratio`: the library's time over ours. What inference could do besides is measured too: `folded` has BN
inside the weight and the addition inside oneDNN's convolution, and only ReLU in a pass of its own (the library's ReLU
makes 0 of NaN), against the convolution followed by one pass of BN, addition and ReLU, which is what blocks run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from layers import Conv, read_network
from torch import Tensor

from fusedres.measuring.timing import comparison, interleave
from fusedres.models import resnet18, resnet50
from fusedres.ops import selftest
from fusedres.ops.contract import (
    BnAddReluForward,
    Conv1x1Forward,
    ConvBackwardInput,
    ConvBackwardWeight,
    RawOp,
)
from fusedres.ops.dispatch import LOADERS
from fusedres.ops.reference import REFERENCE

CPU = torch.device("cpu")
IMAGE = (3, 224, 224)


class Contest(NamedTuple):
    """One op, for `selftest`, and two ways to run it. op: None where torch alone runs."""

    name: str
    op: RawOp | None
    library: Callable[[], object]
    ours: Callable[[], object]


def shapes() -> Iterator[Conv]:
    """Each shape of the blocks' convolutions once, in the order of the networks."""
    seen = set()
    for network in (read_network("resnet50", resnet50(), IMAGE), read_network("resnet18", resnet18(), IMAGE)):
        for conv in network.convs[1:]:
            shape = replace(conv, name="")
            if shape not in seen:
                seen.add(shape)
                yield conv


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype, memory_format=torch.channels_last)


def contests(conv: Conv, batch: int, dtype: torch.dtype) -> Iterator[Contest]:
    """What of this convolution the native library can run."""
    native = LOADERS["native"]()
    x = random(batch, conv.cin, conv.h_in, conv.w_in, dtype=dtype)
    dy = random(batch, conv.cout, conv.h, conv.w, dtype=dtype)
    weight = random(conv.cout, conv.cin, *conv.kernel, dtype=dtype) / conv.cin**0.5
    padding = tuple(k // 2 for k in conv.kernel)
    window = conv.stride, padding, (1, 1), 1
    label = f"{conv.kernel[0]}x{conv.kernel[1]}/{conv.stride[0]} {conv.cin}->{conv.cout} at {conv.h}"

    def contest(name: str, op: RawOp) -> Contest:
        return Contest(f"{name}, {label}", op, partial(REFERENCE, op), partial(native, op))

    yield contest("weight gradient", ConvBackwardWeight(dy, x, conv.kernel, *window))
    gradient = ConvBackwardInput(dy, x, weight, *window)
    if conv.pointwise:
        yield contest("input gradient onto another", gradient._replace(shortcut_dy=x.clone()))
    if conv.pointwise and not conv.strided:
        yield contest("input gradient", gradient)
    scale, shift = 1 + torch.rand(conv.cout), torch.rand(conv.cout)

    def passes() -> Tensor:
        c = torch.conv2d(x, weight, None, *window)
        return native(BnAddReluForward(c, scale, shift, dy, reuse_c=True))[0]

    if conv.pointwise and not conv.strided:
        op = Conv1x1Forward(x, weight, scale=scale, shift=shift, residual=dy, relu=True)
        yield Contest(f"inference, {label}", op, passes, partial(native, op))
        return

    def folded() -> Tensor:
        product = (weight * scale.view(-1, 1, 1, 1)).to(dtype), shift.to(dtype)
        where = padding, conv.stride, (1, 1), 1
        add = torch.ops.mkldnn._convolution_pointwise.binary
        return add(x, dy, *product, *where, "add", 1.0, None, [], "").relu_()

    yield Contest(f"inference folded, {label}", None, passes, folded)


def measure(contest: Contest, rounds: int) -> dict[str, object]:
    """Raises AssertionError if the native result is wrong."""
    if contest.op is not None:
        wrong = selftest.problem(contest.op, LOADERS["native"]()(contest.op))
        if wrong is not None:
            raise AssertionError(f"{contest.name}: {wrong}")
    return comparison(*interleave(contest.library, contest.ours, CPU, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    native, dtype, cells = LOADERS["native"](), getattr(torch, options.dtype), {}
    for conv in shapes():
        operations = 2 * options.batch * conv.h * conv.w * conv.weights
        for contest in contests(conv, options.batch, dtype):
            cell = measure(contest, options.rounds)
            served = contest.op is not None and native.reason(contest.op) is None
            rates = {
                side: operations / cell[key] / 1e9  # type: ignore[operator]
                for side, key in (("gigaflops", "seconds"), ("library_gigaflops", "baseline_seconds"))
            }
            cells[contest.name] = {**cell, **rates, "served": served}
            print(f"{contest.name}: {cell['ratio']:.2f}", file=sys.stderr)
    threads = torch.get_num_threads()
    kept = {"torch": torch.__version__, "threads": threads, "batch": options.batch, "dtype": options.dtype}
    print(json.dumps({**kept, "cells": cells}, indent=1))


if __name__ == "__main__":
    main()
