"""The steps of a recording and their words, which csrc/front/recording.cpp reads.

A slot holds a tensor; the inputs have the first slots, NONE stands for no tensor.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

NONE = -1
ALIGNMENT = 16  # bytes: what Triton compiles kernels for

# c10::ScalarType and c10::DeviceType, whose numbers torch never changes
DTYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}
DEVICES = {"cpu": 0, "cuda": 1}


class UnrecordableError(Exception):
    """A step that a recording cannot hold."""


class Opcode(IntEnum):
    ALLOCATE, VIEW, COPY, ADD, CALL, LAUNCH, FREE = range(7)


class Kind(IntEnum):
    """Of an operator's argument."""

    NONE, TENSOR, INT, BOOL, FLOAT, TENSORS, INTS, BOOLS, FLOATS = range(9)


class Result(IntEnum):
    """Of an operator. A number is thrown away: it is always the same one."""

    TENSOR, OPTIONAL_TENSOR, NUMBER = range(3)


class Word(IntEnum):
    """Of a kernel's parameter."""

    POINTER, INT32, INT64, FLOAT = range(4)


class Step(NamedTuple):
    """words: without the opcode; read, written: the slots of tensors that the step takes, and that it makes."""

    opcode: Opcode
    words: tuple[int, ...]
    read: tuple[int, ...] = ()
    written: tuple[int, ...] = ()


def listed(numbers: Iterable[int]) -> tuple[int, ...]:
    numbers = tuple(int(n) for n in numbers)
    return len(numbers), *numbers


def form(t: Tensor) -> tuple[int, ...]:
    """What t is like: its dtype, device, alignment, sizes and strides.

    Raises:
        UnrecordableError: it is of a dtype or on a device that no recording knows, or no plain tensor.
    """
    if (
        t.dtype not in DTYPES
        or t.device.type not in DEVICES
        or t.layout != torch.strided
        or t.is_conj()
        or t.is_neg()
    ):
        raise UnrecordableError(f"a tensor of {t.dtype} on {t.device}")
    index = -1 if t.device.index is None else int(t.device.index)
    aligned = t.data_ptr() % ALIGNMENT == 0
    kind = DTYPES[t.dtype], DEVICES[t.device.type], index, int(aligned)
    return *kind, *listed(t.shape), *listed(t.stride())


def bits(number: float) -> int:
    """Of a float64."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def float32_bits(number: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


def allocate(made: int, t: Tensor) -> Step:
    return Step(Opcode.ALLOCATE, (made, *form(t)), (), (made,))


def view(made: int, base: int, t: Tensor, of: Tensor) -> Step:
    """made: t, which lies in the storage of `of`, the tensor in `base`."""
    if t.dtype is not of.dtype:
        raise UnrecordableError("a view of another dtype")
    offset = int(t.storage_offset() - of.storage_offset())
    return Step(Opcode.VIEW, (made, base, offset, *listed(t.shape), *listed(t.stride())), (base,), (made,))


def copy(written: int, source: int) -> Step:
    return Step(Opcode.COPY, (written, source), (written, source))


def add(made: int, left: int, right: int) -> Step:
    return Step(Opcode.ADD, (made, left, right), (left, right), (made,))


def with_frees(steps: Sequence[Step], kept: set[int], inputs: int) -> list[Step]:
    """The steps, each tensor given back after the last step that takes it, as Python does; kept: the outputs."""
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        for slot in (*step.read, *step.written):
            last[slot] = i
    freed: dict[int, list[int]] = {}
    for slot, i in last.items():
        if slot >= inputs and slot not in kept:
            freed.setdefault(i, []).append(slot)
    result = []
    for i, step in enumerate(steps):
        result.append(step)
        if i in freed:
            result.append(Step(Opcode.FREE, listed(freed[i])))
    return result


def encoded(
    slots: int,
    inputs: Sequence[Tensor],
    steps: Iterable[Step],
    results: Sequence[int],
    outputs: Sequence[int],
) -> Tensor:
    """All of it as int64 words on the CPU. results: slots or NONE; outputs: those of them that the steps make."""
    words = [slots, len(inputs)]
    for t in inputs:
        words += form(t)
    words += listed(results)
    words += listed(outputs)
    for step in steps:
        words += (step.opcode, *step.words)
    return torch.tensor(words, dtype=torch.int64, device="cpu")
