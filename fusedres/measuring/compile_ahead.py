"""Triton's kernels of a step, compiled by all cores at once before any is launched.

A plan comes first: the step runs with Triton's ops computed by the reference, so that hooks see right values, while
each launch is handed to a pool of threads that compile; the compiler's passes run without Python's lock. What was
compiled is in this process and on disk when the step runs for real. A kernel that cannot be compiled is left to that
step, which says so and sets its op aside.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fusedres.blocks import RECIPES
from fusedres.blocks.choice import AUTO
from fusedres.measuring import ranks
from fusedres.measuring.progress import Progress, untold
from fusedres.modules.derived_class import STATE
from fusedres.ops import triton
from fusedres.ops.dispatch import dispatcher
from fusedres.patching.api import patched_blocks
from fusedres.patching.state import BlockState
from fusedres.recording import replays
from fusedres.trials import settings
from fusedres.trials.kind import is_out_of_memory

logger = logging.getLogger("fusedres")
DEVICES = {"cuda"}  # on which Triton's kernels run
MOST_THREADS = 32  # each holds a module of LLVM's, of up to 100 MB


def states_of(model: nn.Module) -> list[BlockState]:
    return [vars(block)[STATE] for _, block in patched_blocks(model)]


def is_needed(model: nn.Module, tensors: list[Tensor]) -> bool:
    """Whether a step of the model on these tensors may launch kernels that have to be compiled: none does on a CPU."""
    if triton.is_interpreted() or all(t.device.type not in DEVICES for t in tensors):
        return False
    names = {state.backend for state in states_of(model)}
    return any(backend.name == triton.NAME for name in names for backend in dispatcher(name).backends)


def threads() -> int:
    """As many as this process has cores."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return min(MOST_THREADS, len(affinity(0)) if affinity is not None else os.cpu_count() or 1)


@contextmanager
def pool(progress: Progress) -> Iterator[None]:
    """Within the context, in this thread, Triton's kernels are compiled by threads; at its end all are.

    What the compiler raises is dropped: a launch of that kernel compiles it again, and raises it.
    """
    from triton import AsyncCompileMode

    with (
        ThreadPoolExecutor(threads(), thread_name_prefix="fusedres-compile") as executor,
        AsyncCompileMode(executor, ignore_errors=True) as mode,
    ):
        try:
            yield
            futures = list(mode.raw_futures)
            for done, future in enumerate(as_completed(futures), 1):
                if (error := future.exception()) is not None:
                    logger.debug("a kernel was not compiled ahead: %s", error)
                progress("compiling kernels", done, len(futures))
        except BaseException:
            # What has not begun is not worth waiting for. Each by itself: a pool that is shut down tells nobody of
            # what it cancels, and the mode would wait for it.
            for future in mode.raw_futures:
                future.cancel()
            raise


@contextmanager
def planning(states: list[BlockState], recipe: str | None) -> Iterator[None]:
    """Within the context calls of these blocks leave no trace, and those on trial run by the recipe; None: as ever.

    Backward runs in this thread, as CUDA's would not by itself, for the plan is this thread's.
    """
    warm = [set(state.warm) for state in states]
    for state in states:
        state.on_trial.planned = recipe
    try:
        with replays.off(), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        for state, kinds in zip(states, warm, strict=True):
            state.warm, state.on_trial.planned = kinds, None


def recipes_of(states: list[BlockState], device: torch.device) -> list[str | None]:
    """By which recipes the blocks on trial are to be planned, one after the other."""
    may_be_tried = any(state.recipe == AUTO for state in states) and settings.is_on(device)
    return list(RECIPES) if may_be_tried else [None]


def compile_step(
    model: nn.Module,
    step: Callable[[], object],
    tensors: list[Tensor],
    progress: Progress = untold,
    alone: bool = False,
) -> None:
    """Compiles the Triton kernels that a step of the model needs, in this process or in another one of this machine.

    Does nothing where no kernel is to be compiled. In a process group, which every rank has to call this in, the first
    rank of each machine compiles, and all wait for it.

    Args:
        step: a step of the model, which runs once or, where recipes are on trial, once by each of them.
        tensors: all that the step computes with.
        progress: called as kernels are compiled, with how many are, out of how many.
        alone: compiles in this process whatever others there are, which need not call this.

    Raises:
        RuntimeError: the step failed on another rank; what it raises here is raised as it is.
    """
    if not is_needed(model, tensors):
        return
    states, is_compiling = states_of(model), alone or ranks.is_first_here()
    device = next(t.device for t in tensors if t.device.type in DEVICES)
    all_ranks = nullcontext() if alone else ranks.together("compiling the kernels of a step", device)
    with all_ranks, ExitStack() as stack:
        if is_compiling:
            stack.enter_context(pool(progress))
        stack.enter_context(triton.compiles_only(is_compiling))
        for recipe in recipes_of(states, device):
            with planning(states, recipe):
                try:
                    step()
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    # the reference takes more than the kernels: what is not planned is compiled as it is launched
                    logger.info("fusedres: no memory to plan all kernels of a step ahead: %s", error)
