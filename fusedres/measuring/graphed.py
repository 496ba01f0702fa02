"""graphed: a model's forward, and its backward, as CUDA graphs whose replay runs no Python of the model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from fusedres.errors import CaptureError, UnsupportedModelError
from fusedres.measuring import capturable
from fusedres.measuring.captured_state import InputForm, ModelState, replaced_buffer
from fusedres.measuring.cuda_graphs import CudaGraphs
from fusedres.measuring.graph_trial import capture_fastest
from fusedres.measuring.warmup import restored_buffers


class Graphed(nn.Module):
    """What `graphed` returns: called like the model, with inputs like the example, it replays CUDA graphs.

    module: the model itself, which is not changed: its parameters, buffers and state_dict are what a replay reads and
    moves. `parameters()`, `train()` and `eval()` go to it, as with DistributedDataParallel, and names in this one's
    state_dict begin with "module."; save `module.state_dict()`.
    """

    def __init__(self, model: nn.Module, inputs: InputForm, graphs: CudaGraphs) -> None:
        super().__init__()
        self.module = model
        self.training = model.training
        self._inputs, self._graphs = inputs, graphs
        self._state = ModelState(model)

    def forward(self, *args: Any) -> Any:
        """The model's result for arguments like the example.

        Raises:
            TypeError, ValueError: an argument differs from the example's; the message names it and how.
            CaptureError: the model or autocast is not as it was captured, or a CUDA graph is being captured.
        """
        check_no_capture("it cannot be replayed inside of another; call .module there")
        given = self._inputs.check(args)
        self._state.check()
        return self._graphs(given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("fusedres.graphed: a CUDA graph cannot be copied; copy .module and capture the copy.")

    def __getstate__(self) -> Any:
        raise TypeError(
            "fusedres.graphed: a CUDA graph cannot be saved; save .module.state_dict(), and capture where it is loaded."
        )

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{shape} {dtype}" for shape, dtype, *_ in self._inputs.forms)
        return f"inputs: {sizes}; backward: {bool(self._graphs.differentiable)}"


def check_no_capture(otherwise: str) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise CaptureError(f"fusedres.graphed: a CUDA graph is being captured, and {otherwise}.")


def without_cache(device_type: str) -> AbstractContextManager[Any]:
    """The caller's autocast without its cache: a cast of a weight that is kept would not be made again in a replay."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)


def graphed(
    model: nn.Module, example: Any, *, backward: bool | None = None, copy_outputs: bool = True
) -> Graphed:
    """Captures a model on a GPU in CUDA graphs: a step then costs the CPU one launch, not hundreds.

    It runs the model a few times first, so `fusedres.warmup` need not be called; then it captures what it ran, in the
    mode the model is in and under the autocast the caller is in. Where no table names the recipes of a patched model,
    it captures and times each of them first. Parameters, their gradients, buffers (running statistics,
    num_batches_tracked), random number generators and modes are left as they were. Any model may be captured, patched
    or not; patch it before.

    It returns a new module and leaves the model's own forward alone, unlike `torch.cuda.make_graphed_callables`, which
    replaces it: a graph takes one mode, one shape and one dtype only, and for everything else (validation, the last
    batch of an epoch, export) the model itself is still there. Several callables of one model, as one in training and
    one in evaluation, may be made and share its parameters.

    A replay does what the capture did, and runs no Python: what a forward decides or counts in Python stays as it was
    in the capture. Each callable holds the activations of one forward: backward has to come before the next forward.
    Second derivatives are not supported. An optimiser must write parameters in place, as torch's do.

    For data-parallel training wrap the result: `DistributedDataParallel(fusedres.graphed(model, example))`.

    Args:
        model: a module on one GPU, patched or not, without hooks.
        example: an input tensor, or a tuple of positional arguments, like those to come; it is left alone. A tensor
            gets a gradient if that of the example requires one.
        backward: whether a backward is captured too; by default in training mode with grad mode on. With `model.eval()`
            a forward without gradients is captured.
        copy_outputs: give each call outputs of their own. Without, a call's outputs are overwritten by the next call,
            which saves a copy.

    Returns:
        A callable module; see `fusedres.measuring.graphed.Graphed`.

    Raises:
        TypeError: the model is no module, or returns something else than tensors and plain constants.
        UnsupportedModelError: the model is wrapped, not on one GPU, uninitialised, has hooks, BNs with momentum=None in
            training, buffers that want a gradient, or a forward that puts a new tensor in the place of a buffer.
        ValueError: the example is not on the model's GPU.
        CaptureError: what the model does cannot be captured, or a CUDA graph is being captured already.
    """
    capturable.check_kind(model)
    inputs = InputForm(example if isinstance(example, tuple) else (example,))
    device = capturable.check_devices(model, dict(zip(inputs.names, inputs.tensors, strict=True)))
    check_no_capture("another capture cannot begin inside; call graphed before")
    if backward is None:
        backward = model.training and torch.is_grad_enabled()
    capturable.check_hooks(model, backward)
    capturable.check_norms(model)
    capturable.check_buffers(model)
    with torch.inference_mode(False):
        static = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs.tensors]
        args = inputs.with_tensors(static)

        def run() -> Any:
            with without_cache(device.type):
                return model(*args)

        def make() -> CudaGraphs:
            return CudaGraphs(run, static, list(model.parameters()), backward, copy_outputs, device)

        devices = [device] if device.type == "cuda" else []
        before = dict(model.named_buffers())
        with torch.random.fork_rng(devices=devices), restored_buffers(model):
            make().warm_up()
            replaced = replaced_buffer(model, before)
            if replaced is not None:
                raise UnsupportedModelError(
                    f"fusedres.graphed: the forward puts a new tensor in the place of buffer {replaced}, which a "
                    "replay would not do; move it in place: buffer.copy_(values) or buffer.add_(1)."
                )
            graphs = capture_fastest(model, make, device)
    inputs.release()
    return Graphed(model, inputs, graphs)
