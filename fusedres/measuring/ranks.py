"""Processes of one process group that prepare something together: one of each machine does it, all wait for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist


def are_many() -> bool:
    """Whether this process is one of several in an initialised process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_here() -> bool:
    """Whether this process is the first one on its machine: by LOCAL_RANK, else the first of all."""
    return not are_many() or int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0


@contextmanager
def together(what: str, device: torch.device) -> Iterator[None]:
    """Leaves the context once every rank does.

    Args:
        what: is done in it, for the message.
        device: of this rank, by which NCCL tells it from the others; the current one may not have been set.

    Raises:
        RuntimeError: another rank raised an error in it. An error of this rank is raised as it is, once all know.
    """
    if not are_many():
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    said: list[str | None] = [None] * dist.get_world_size()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        dist.all_gather_object(said, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [(rank, text) for rank, text in enumerate(said) if text is not None]
    if failed:
        rank, text = failed[0]
        raise RuntimeError(
            f"fusedres: {what} failed on rank {rank} of {len(said)}: {text}. Rank {dist.get_rank()} had no error of "
            "its own; see that rank's output."
        )
