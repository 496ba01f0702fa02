"""Memory of large results on a CPU, kept between calls.

The C library gives large blocks back to the system when they are freed and takes them anew: beyond 32 MiB always, and
smaller ones whenever much is free. The system fills each page of 4 KiB with zeros at its first use, which takes about
as long as the 1x1 convolution that writes it. So results of more than `LARGE` bytes lie in storages of torch's own that
are kept here. A storage serves again once nothing else holds it: no tensor, view, array, capsule or graph. A result is
an ordinary tensor on a storage of its size, which can be resized, shared or pickled as any other.

    FUSEDRES_KEPT_MEMORY=0    keeps none

A process keeps no more than `most_bytes()`, no more than `SPARE` beside what was held at once, and no storage that
served none of the last `WINDOW` results: every so many of them are looked through. The free ones go before a fork, for
the child would hold their pages too, and where an allocation fails.
"""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fusedres.ops.contract import Conv1x1Forward, Conv3x3Forward

ENVIRONMENT_VARIABLE = "FUSEDRES_KEPT_MEMORY"
LARGE = 1 << 20  # bytes
SHARE = 4  # one such part of the machine's or the container's memory may be kept, by all processes of a training run
SPARE = 1 << 30  # bytes: in inference few results are held at once, of all the sizes that a network has
WINDOW = 256
LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)  # of a container

# how many hold a storage in C++; Python's object of it is one of them
use_count = getattr(torch._C, "_storage_Use_Count", None)


@cache
def most_bytes() -> int:
    """How much is kept: enough for a training step's results where the machine is large."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in LIMITS:
        try:
            limit = path.read_text().strip()
        except OSError:  # there is none, or none that may be read
            continue
        memory = min(memory, int(limit)) if limit.isdecimal() else memory
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")  # as torchrun has it
    return memory // SHARE // max(1, int(processes) if processes.isdecimal() else 1)


@dataclass(eq=False)
class Kept:
    storage: torch.UntypedStorage
    address: int
    size: int
    used: int = 0  # the number of the result that it last served

    def is_as_made(self) -> bool:
        """Whether it still has its bytes, in the same place: nobody has resized or shared it."""
        return self.storage.nbytes() == self.size and self.storage.data_ptr() == self.address

    def is_free(self) -> bool:
        return self.is_as_made() and self.holders() == holders_of_free()

    def holders(self) -> tuple[int, int]:
        """How many hold the storage in C++ and in Python, of which each torch counts some of its own."""
        assert use_count is not None
        return use_count(self.storage._cdata), sys.getrefcount(self.storage)


def make(size: int) -> Kept:
    storage = torch.UntypedStorage(size, device="cpu")
    return Kept(storage, storage.data_ptr(), size)


@cache
def holders_of_free() -> tuple[int, int] | None:
    """`Kept.holders` of a storage that nobody else holds; None where torch does not show who does."""
    if use_count is None:
        return None
    kept = make(1)
    before = kept.holders()
    tensor = torch.empty(0, dtype=torch.uint8, device="cpu").set_(kept.storage)
    with_tensor = kept.holders()
    held = tensor.untyped_storage()
    del tensor
    with_object = kept.holders()
    del held
    return before if before == kept.holders() and before not in (with_tensor, with_object) else None


def is_on() -> bool:
    return os.environ.get(ENVIRONMENT_VARIABLE) != "0" and holders_of_free() is not None


class KeptMemory:
    """The storages, the last used first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.storages: list[Kept] = []
        self.results = 0
        self.most_held = 0  # bytes

    def storage(self, size: int) -> torch.UntypedStorage | None:
        """One of so many bytes that nobody else holds; None where too much is kept already. The lock is held until a
        tensor holds it.
        """
        self.results += 1
        if self.results % WINDOW == 0:
            self.storages = self.recent()
            self.most_held //= 2  # one large batch is not for ever
        kept = next((kept for kept in self.storages if kept.size == size and kept.is_free()), None)
        if kept is not None:
            self.storages.remove(kept)
        elif not self.makes_room(size):
            return None
        else:
            try:
                kept = make(size)
            except RuntimeError:  # out of memory
                self.drop_free()
                kept = make(size)
        kept.used = self.results
        self.storages.insert(0, kept)
        return kept.storage

    def drop_free(self) -> None:
        self.storages = [kept for kept in self.storages if not kept.is_free()]

    def before_fork(self) -> None:
        if self.lock.acquire(blocking=False):
            try:
                self.drop_free()
            finally:
                self.lock.release()

    def after_fork(self) -> None:
        """In the child: another thread of the parent may have had the lock."""
        self.lock = threading.Lock()

    def recent(self) -> list[Kept]:
        """What has been used lately; who still holds another one keeps it."""
        return [kept for kept in self.storages if self.results - kept.used < WINDOW]

    def makes_room(self, size: int) -> bool:
        """Whether so much may be kept besides, once what is more than was held at once is dropped, the least recent
        first.
        """
        recent = self.recent()
        free = [kept for kept in recent if kept.is_free()]
        total = size + sum(kept.size for kept in recent)
        self.most_held = max(self.most_held, total - sum(kept.size for kept in free))
        while free and total > self.most_held + SPARE:
            last = free.pop()
            recent.remove(last)
            total -= last.size
        self.storages = recent
        return total <= most_bytes()


KEPT = KeptMemory()
os.register_at_fork(before=lambda: KEPT.before_fork(), after_in_child=lambda: KEPT.after_fork())


def take_result(op: Conv1x1Forward | Conv3x3Forward) -> Tensor | None:
    """Memory for the result of a convolution whose padding keeps the size where it has no stride, as `take`."""
    height, width = ((side - 1) // op.stride + 1 for side in op.x.shape[2:])
    return take(op.x, op.weight.shape[0], height, width)


def take_like(like: Tensor) -> Tensor | None:
    return take(like, *like.shape[1:])


def take(like: Tensor, channels: int, height: int, width: int) -> Tensor | None:
    """An uninitialised [N, channels, height, width], channels_last, on a kept storage; None: not one to be kept."""
    batch = like.shape[0]
    elements = batch * channels * height * width
    size = elements * like.element_size()
    if size <= LARGE or not like.is_cpu or type(like) is not Tensor:
        return None
    # who cannot have the lock at once does without: another thread, or a finaliser that runs meanwhile
    if not KEPT.lock.acquire(blocking=False):
        return None
    try:
        if not is_on():
            KEPT.storages = []
            return None
        storage = KEPT.storage(size)
        if storage is None:
            return None
        shape, row = (batch, channels, height, width), width * channels
        strides = height * row, 1, row, channels
        return torch.empty(0, dtype=like.dtype, device="cpu").set_(storage, 0, shape, strides)
    finally:
        KEPT.lock.release()
