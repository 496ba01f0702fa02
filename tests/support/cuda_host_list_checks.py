"""Checks of casts and running statistics, whose kernels take several tensors and are no records of the contract.

`LIST_CHECKS[op](ops, variant)` raises AssertionError where the host build is wrong. Each tensor ends where its memory
does, so that AddressSanitizer sees what is read or written past it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cuda_host_ops import HostCudaOps
from raw_op_cases import bits
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# a packet has 8 elements, a block of threads has 2048
SIZES = (2048, 0, 1, 7, 8, 9, 2047, 2049, 4099, 64, 63, 65, 16, 17, 24, 2048 + 8)
# NaN, infinities, values halfway between two of bfloat16 or float16, subnormal ones, and too large ones
SPECIAL = (
    *(float("nan"), float("inf"), float("-inf"), -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11),
    *(2.0**-24, 2.0**-25, 3 * 2.0**-25, -(2.0**-26), 2.0**-140, 65504.0, 65519.0, 65520.0, -3.4e38),
)
MOST_BLOCKS = 1024  # of a tensor in a cast: then blocks take several parts
FMA = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
FMA.argtypes, FMA.restype = [ctypes.c_float] * 3, ctypes.c_float


def at(offset: int, values: Tensor) -> Tensor:
    """The values, so many elements after an address at a multiple of 64 bytes, at the end of their memory."""
    tensor = torch.empty(offset + len(values), dtype=values.dtype)[offset:]
    return tensor.copy_(values)


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    """To the bit, but for which NaN it is."""
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan), f"{what}: NaN elsewhere"
    assert torch.equal(bits(found[~nan]), bits(expected[~nan])), what


# ------------------------------------------------------------------------------------------ casts


def cast(ops: HostCudaOps, given: list[Tensor], target: torch.dtype, offset: int) -> list[Tensor]:
    """Each in that dtype, so many elements after an aligned address."""
    made = [at(offset, torch.full((len(t),), float("nan"), dtype=target)) for t in given]
    args = ops._args("Cast", to=getattr(ops.module.Dtype, name_of(target)))
    setattr(args, "from", getattr(ops.module.Dtype, name_of(given[0].dtype)))
    args.tensors = [flat(ops, source, result) for source, result in zip(given, made, strict=True)]
    ops._launch("cast", args)
    return made


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def flat(ops: HostCudaOps, source: Tensor, result: Tensor) -> Any:
    item = ops._args("CastFlat", numel=len(source), to=result)
    setattr(item, "from", source.data_ptr())
    return item


def numbers(numel: int, generator: torch.Generator) -> Tensor:
    """Of every size that float16 has, with special ones among the first and at the end."""
    values = torch.randn(numel, generator=generator) * torch.exp2(
        torch.randint(-20, 15, (numel,), generator=generator)
    )
    few = torch.tensor(SPECIAL[: numel // 2])
    values[: len(few)] = few
    values[numel - len(few) :] = few.flip(0)
    return values


def check_cast(ops: HostCudaOps, variant: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for source, target in itertools.product(DTYPES, DTYPES):
        # of packets; read, written, or both from addresses in between
        for read, written in ((0, 0), (1, 0), (0, 1), (3, 3)):
            given = [at(read, numbers(numel, generator).to(source)) for numel in SIZES]
            for tensors in (given, given[:1], given[1:2], given[-2:]):
                made = cast(ops, tensors, target, written)
                for one, result in zip(tensors, made, strict=True):
                    what = f"cast {source} at {read} to {target} at {written}, {len(one)}"
                    assert_same(result, one.to(target), what)
    if variant == "thread":  # which takes long for so many, and they add no sharing of memory
        return
    long = at(0, numbers(MOST_BLOCKS * 2048 + 4099, generator).to(torch.bfloat16))
    assert_same(cast(ops, [long], torch.float32, 0)[0], long.float(), "cast, blocks of several parts")


# ------------------------------------------------------------------------------------------ running statistics


class Norm(NamedTuple):
    running_mean: Tensor
    running_var: Tensor
    counter: Tensor | None
    mean: Tensor
    var: Tensor
    keep: float
    weight: float
    unbiased: float


def move(ops: HostCudaOps, norms: list[Norm]) -> None:
    """In as many launches as they need."""
    most = ops.module.BnRunningStats.most
    for first in range(0, len(norms), most):
        items = []
        for norm in norms[first : first + most]:
            items.append(ops._args("BnRunningStatsNorm", channels=len(norm.mean), **norm._asdict()))
        args = ops._args("BnRunningStats")
        args.norms = items
        ops._launch("bn_running_stats", args)


def moved(running: Tensor, batch: Tensor, keep: float, weight: float) -> Tensor:
    """keep*running, rounded, + weight*batch, rounded once."""
    kept = running * torch.tensor(keep)  # of float32, as the kernel has it
    values = zip(batch.tolist(), kept.tolist(), strict=True)
    return torch.tensor([FMA(weight, b, k) for b, k in values], dtype=torch.float32)


def a_norm(channels: int, counted: bool, generator: torch.Generator) -> Norm:
    vectors = [torch.randn(channels, generator=generator) for _ in range(4)]
    for i, value in enumerate(
        (float("nan"), float("inf"), -float("inf"))
    ):  # of the batch, and of what it moves
        for vector in vectors:
            if channels > 8:
                vector[(5 * i + int(vector is vectors[0])) % channels] = value
    running_mean, running_var, mean, var = (at(1, v) for v in vectors)
    counter = torch.tensor(41) if counted else None
    momentum = float(torch.rand((), generator=generator, dtype=torch.float64))
    rows = 2 + int(torch.randint(100, (), generator=generator))
    unbiased = momentum * rows / (rows - 1)
    return Norm(running_mean, running_var, counter, mean, var, 1 - momentum, momentum, unbiased)


def check_running_stats(ops: HostCudaOps, variant: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (0, 130, 17, 128, 129, 1, 64, 300, 3)  # a block has 128
    for count in range(1, len(sizes) + 1):
        for counted in (False, True):
            norms = [a_norm(sizes[i], counted or i == 1, generator) for i in range(count)]
            expected = [
                (
                    moved(n.running_mean, n.mean, n.keep, n.weight),
                    moved(n.running_var, n.var, n.keep, n.unbiased),
                )
                for n in norms
            ]
            before = [(n.mean.clone(), n.var.clone()) for n in norms]
            move(ops, norms)
            for i, (norm, (mean, var), given) in enumerate(zip(norms, expected, before, strict=True)):
                what = f"norm {i} of {count}, {sizes[i]} channels"
                assert_same(norm.running_mean, mean, f"mean of {what}")
                assert_same(norm.running_var, var, f"var of {what}")
                assert_same(norm.mean, given[0], f"batch mean of {what}")
                assert_same(norm.var, given[1], f"batch var of {what}")
                assert norm.counter is None or int(norm.counter) == 42, f"counter of {what}"


LIST_CHECKS: dict[str, Callable[[HostCudaOps, str], None]] = {
    "cast": check_cast,
    "bn_running_stats": check_running_stats,
}
