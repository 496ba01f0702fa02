"""Whether a CUDA graph can hold a model: what is found by looking, before anything is captured."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.errors import UnsupportedModelError
from fusedres.modules.lazy import is_uninitialised
from fusedres.patching.api import check_module, wrapper_of
from fusedres.patching.resolve import has_global_hooks

WRAPPERS = {
    "DataParallel": "it spreads over several GPUs; capture model.module, with one process for each GPU",
    "DistributedDataParallel": "capture first, then wrap: DistributedDataParallel(fusedres.graphed(model, example)). "
    "Gradients are then reduced outside of the graph",
    "FullyShardedDataParallel": "it gathers its parameters anew in each step, where a graph needs them to stay",
    "FSDPModule": "fully_shard gathers its parameters anew in each step, where a graph needs them to stay",
    "OptimizedModule": 'the compiler has graphs of its own: torch.compile(model, mode="reduce-overhead")',
    "Graphed": "it is captured already; its model is .module",
}
GPU = "cuda"  # the kind of device that has graphs
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def check_kind(model: object) -> None:
    """Raises TypeError for what is no module, UnsupportedModelError for a wrapper or an uninitialised model."""
    check_module(model, "graphed")
    assert isinstance(model, nn.Module)
    wrapper = wrapper_of(model)
    if wrapper is not None:
        raise UnsupportedModelError(
            f"fusedres.graphed: the model is wrapped by {wrapper}: {WRAPPERS[wrapper]}."
        )
    if is_uninitialised(model):
        raise UnsupportedModelError(
            f"fusedres.graphed: {type(model).__name__} holds a lazy module that no call has initialised, and a graph "
            "needs parameters with a shape; call the model once, then capture it."
        )


def check_devices(model: nn.Module, inputs: dict[str, Tensor]) -> torch.device:
    """The one GPU that everything is on.

    Raises:
        UnsupportedModelError: a parameter or buffer is not on a GPU, or they are on several.
        ValueError: an input is not on the model's GPU, or there is no tensor at all.
    """
    held = {name: t.device for name, t in tensors_of(model)}
    first = next(iter(held.items()), None) or next(((n, t.device) for n, t in inputs.items()), None)
    if first is None:
        raise ValueError(
            "fusedres.graphed: neither the model nor the example has a tensor; a graph needs one."
        )
    for name, device in held.items():
        if device.type != GPU:
            fix = (
                "model.cuda()"
                if torch.cuda.is_available()
                else "this machine has none: call the model as it is"
            )
            raise UnsupportedModelError(
                f"fusedres.graphed: {name} is on {device}, and a CUDA graph needs a GPU; {fix}."
            )
        if device != first[1]:
            raise UnsupportedModelError(
                f"fusedres.graphed: {first[0]} is on {first[1]} and {name} on {device}; a graph holds one GPU. Capture "
                "the part on each GPU by itself."
            )
    for name, x in inputs.items():
        if x.device != first[1] or x.device.type != GPU:
            raise ValueError(
                f"fusedres.graphed: {name} of the example is on {x.device}, needed "
                f"{first[1] if first[1].type == GPU else 'a GPU'}; move it there with .to()."
            )
    return first[1]


def check_hooks(model: nn.Module, gradients: bool) -> None:
    """Raises UnsupportedModelError where Python would have to run in the middle of a replay, or twice."""
    if has_global_hooks():
        raise UnsupportedModelError(
            "fusedres.graphed: a hook is registered on all modules, and a replay runs no Python; remove it first."
        )
    for name, module in model.named_modules():
        if any(getattr(module, hooks) for hooks in HOOKS):
            raise UnsupportedModelError(
                f"fusedres.graphed: a hook is registered on {name or 'the model'}, and a replay runs no Python inside "
                "the model. Remove it, or register it on what graphed returns."
            )
    for name, parameter in model.named_parameters() if gradients else ():
        if parameter._backward_hooks:
            raise UnsupportedModelError(
                f"fusedres.graphed: a hook is registered on {name}: it would be captured, and run once more on each "
                "gradient; remove it, capture, and register it afterwards."
            )


def check_norms(model: nn.Module) -> None:
    """Raises UnsupportedModelError for a cumulative average: its weight is read from the GPU in each step."""
    for name, module in model.named_modules():
        if (
            isinstance(module, _BatchNorm)
            and module.training
            and module.momentum is None
            and module.track_running_stats
            and module.num_batches_tracked is not None
        ):
            raise UnsupportedModelError(
                f"fusedres.graphed: {name or 'the model'} has momentum=None, a cumulative average: each step reads its "
                "counter on the CPU, which a graph cannot; set a number, as momentum=0.1, or put that norm into "
                "evaluation."
            )


def check_buffers(model: nn.Module) -> None:
    """Raises UnsupportedModelError for a buffer that wants a gradient."""
    for name, buffer in model.named_buffers():
        if buffer.requires_grad:
            raise UnsupportedModelError(
                f"fusedres.graphed: buffer {name} requires a gradient, and a graph hands gradients to inputs and "
                "parameters; make it a parameter, or requires_grad_(False)."
            )
