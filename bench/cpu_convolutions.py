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
from typing import Any, NamedTuple

import torch
from layers import Conv, read_network
from torch import Tensor

from fusedres import selftest
from fusedres.backends.reference import ReferenceOps
from fusedres.dispatch import LOADERS
from fusedres.models import resnet18, resnet50
from fusedres.timing import comparison, interleave

CPU = torch.device("cpu")
IMAGE = (3, 224, 224)


class Contest(NamedTuple):
    """One op's arguments, for `selftest`, and two ways to run it. op: None where what runs is torch's own."""

    name: str
    op: str | None
    arguments: tuple[Any, ...]
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
    native, reference = LOADERS["native"](), ReferenceOps()
    x = random(batch, conv.cin, conv.h_in, conv.w_in, dtype=dtype)
    dy = random(batch, conv.cout, conv.h, conv.w, dtype=dtype)
    weight = random(conv.cout, conv.cin, *conv.kernel, dtype=dtype) / conv.cin**0.5
    padding = tuple(k // 2 for k in conv.kernel)
    window = conv.stride, padding, (1, 1), 1
    label = f"{conv.kernel[0]}x{conv.kernel[1]}/{conv.stride[0]} {conv.cin}->{conv.cout} at {conv.h}"

    def contest(name: str, op: str, *arguments: Any) -> Contest:
        run = [lambda ops=ops: getattr(ops, op)(*arguments) for ops in (reference, native)]
        return Contest(f"{name}, {label}", op, arguments, *run)

    yield contest("weight gradient", "conv_backward_weight", dy, x, conv.kernel, *window)
    if conv.pointwise:
        yield contest("input gradient onto another", "conv_backward_input", dy, x, weight, *window, x.clone())
    if conv.pointwise and not conv.strided:
        yield contest("input gradient", "conv_backward_input", dy, x, weight, *window)
    scale, shift = 1 + torch.rand(conv.cout), torch.rand(conv.cout)

    def passes() -> Tensor:
        c = torch.conv2d(x, weight, None, *window)
        return native.bn_add_relu_forward(c, scale, shift, dy, reuse_c=True)[0]

    if conv.pointwise and not conv.strided:
        arguments = x, weight, None, 1, None, None, scale, shift, dy, None, None, True
        ours = lambda: native.conv1x1_forward(*arguments)  # noqa: E731
        yield Contest(f"inference, {label}", "conv1x1_forward", arguments, passes, ours)
        return

    def folded() -> Tensor:
        product = (weight * scale.view(-1, 1, 1, 1)).to(dtype), shift.to(dtype)
        where = padding, conv.stride, (1, 1), 1
        add = torch.ops.mkldnn._convolution_pointwise.binary
        return add(x, dy, *product, *where, "add", 1.0, None, [], "").relu_()

    yield Contest(f"inference folded, {label}", None, (), passes, folded)


def measure(contest: Contest, rounds: int) -> dict[str, object]:
    """Raises AssertionError if the native result is wrong."""
    if contest.op is not None:
        found = getattr(LOADERS["native"](), contest.op)(*contest.arguments)
        wrong = selftest.problem(contest.op, contest.arguments, found)
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
            served = contest.op is not None and native.supports(contest.op, *contest.arguments) is None
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
