"""warmup: every kernel that a patched model needs is compiled and chosen now, not in the first step or a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fusedres.errors import UnsupportedModelError
from fusedres.measuring.compile_ahead import compile_step
from fusedres.measuring.progress import Progress, untold
from fusedres.modules.derived_class import STATE
from fusedres.modules.lazy import initialised_copy, is_uninitialised
from fusedres.patching.api import bind, check_model, is_patched, patched_blocks

MOST_STEPS = 200


@contextmanager
def restored_buffers(model: nn.Module) -> Iterator[None]:
    """Afterwards every buffer is the tensor it was, with the values it had."""
    before = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in before:
                module._buffers[name] = buffer
                if buffer is not None and values is not None:
                    buffer.copy_(values)


def cuda_devices(tensors: list[Tensor]) -> list[torch.device]:
    return sorted({t.device for t in tensors if t.is_cuda}, key=str)


def differentiable(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.requires_grad]


def timed_so_far(model: nn.Module) -> int:
    """How many calls and steps of the model were to be timed for a trial."""
    bind(model)
    wholes = {id(w): w for w in (vars(block)[STATE].on_trial.whole for _, block in patched_blocks(model))}
    return sum(whole.issued for whole in wholes.values())


def settle(
    model: nn.Module,
    step: Callable[[], object],
    after_step: Callable[[int, int], object] = lambda done, most: None,
) -> None:
    """Runs the step, once at least, until nothing that it calls of the model is timed for a trial any more.

    after_step: called while that is not so, with how many steps are over, out of how many at most.
    """
    for done in range(1, MOST_STEPS + 1):
        before = timed_so_far(model)
        step()
        if timed_so_far(model) == before:
            return
        after_step(done, MOST_STEPS)


def warmup(model: nn.Module, example: Any, *, measure: bool = False, progress: Progress = untold) -> None:
    """Runs the patched model on an example, so that nothing is compiled or searched for afterwards.

    One forward without gradients and, where anything wants one and the caller is not in `torch.no_grad()`, a forward
    and a backward: in the mode the model is in, under the autocast the caller is in. Call it again for another mode,
    dtype or shape of input, and before a CUDA graph is captured. Parameters, their gradients, buffers, random number
    generators and modes are left as they were; hooks run. On a CPU, where nothing is compiled, it is two plain steps.

    On a GPU the same runs once more before, by the reference, to find the Triton kernels that are needed, also by the
    recipes on trial; as many threads as the process has cores compile them meanwhile. In a process group of
    torch.distributed every rank has to call this: the first one of each machine (LOCAL_RANK 0; without that variable,
    rank 0) compiles, and the others wait and find the kernels in Triton's cache.

    Args:
        model: a patched model.
        example: an input tensor, or a tuple of positional arguments, like those to come; it is left alone.
        measure: whether to go on until every recipe that is on trial has its verdict, as the first steps of training
            would come to otherwise; at most MOST_STEPS of each kind.
        progress: called between kernels and between steps with what is done now, how many of it are over, and out of
            how many.

    Raises:
        TypeError, UnsupportedModelError: as `fusedres.patch`, or no block of the model is patched.
        RuntimeError: a CUDA graph is being captured: then it is too late; or the step failed on another rank.
    """
    check_model(model, "warmup")
    if not is_patched(model):
        raise UnsupportedModelError(
            f"fusedres.warmup: no block of {type(model).__name__} is patched; call fusedres.patch(model) first."
        )
    example = example if isinstance(example, tuple) else (example,)
    if is_uninitialised(model):  # a first call would initialise it: that is the caller's to make
        model = initialised_copy(model, example)
    tensors = [t for t in tree_leaves(example) if isinstance(t, Tensor)]
    devices = cuda_devices([*tensors, *model.parameters()])
    if devices and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "fusedres.warmup: a CUDA graph is being captured, and compiling inside it fails; call warmup before."
        )

    with_gradients = torch.is_grad_enabled()

    def step() -> None:
        with torch.no_grad():
            model(*example)
        if not with_gradients:
            return
        with torch.enable_grad():
            outputs = differentiable(model(*example))
            wanted = differentiable((list(model.parameters()), example))
            if outputs and wanted:
                # not `backward`: that would add to the gradients and set off what waits for them
                ones = [torch.ones_like(out) for out in outputs]
                torch.autograd.grad(outputs, wanted, ones, allow_unused=True)

    with torch.random.fork_rng(devices=devices), restored_buffers(model):
        compile_step(model, step, [*tensors, *model.parameters()], progress)
        if measure:
            settle(model, step, partial(progress, "trying recipes"))
        else:
            step()
    for device in devices:
        torch.cuda.synchronize(device)
