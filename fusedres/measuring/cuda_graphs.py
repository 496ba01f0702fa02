"""A run of a model, and its backward, as CUDA graphs: recorded once over tensors that stay in place, then replayed.

What `torch.cuda.make_graphed_callables` does, and three things more. Gradients are handed out as copies: autograd keeps
the first gradient that it is given as `grad`, and the next replay would write over it, so that gradients could not be
accumulated. A backward whose activations were replaced by another forward is an error. And
warm-up and capture share one stream, so that a library's handle of that stream exists before the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten

from fusedres.errors import CaptureError

WARMUP_RUNS = (
    3  # as many as torch's own: libraries measure their algorithms, Triton compiles, the allocator grows
)
CONSTANTS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
)  # of a result: they are given again as they were captured


def explanation(what: str, cause: Exception) -> CaptureError:
    first_line = (str(cause).strip().splitlines() or [""])[0]
    return CaptureError(
        f"fusedres.graphed: the {what} cannot be captured: {type(cause).__name__}: {first_line}. The same step ran "
        "outside of a capture, so it does what a graph cannot hold: it reads a tensor's value on the CPU (.item(), "
        "print, `if tensor:`), makes a tensor of host data, or uses another stream. Take that out of the model's "
        'forward, or capture a part that is without it; torch.cuda.set_sync_debug_mode("warn") names the place.'
    )


class CudaGraphs:
    """One run, forward and backward, over fixed memory.

    Args:
        run: the model on `inputs`; takes nothing, returns any pytree.
        inputs: tensors of its own, which each replay writes the new values into.
        parameters: what else may want a gradient.
        gradients: whether a backward is captured; it is only where a result has a gradient that something wants.
        copy_outputs: whether results are copies, or the memory that the next replay writes to.
    """

    def __init__(
        self,
        run: Callable[[], Any],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        gradients: bool,
        copy_outputs: bool,
        device: torch.device,
    ) -> None:
        self.run, self.inputs, self.parameters = run, inputs, parameters
        self.sources = [*inputs, *parameters]
        self.wanted = [t for t in self.sources if t.requires_grad] if gradients else []
        self.copy_outputs, self.device = copy_outputs, device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.leaves: list[Any] = []  # of the result: a place among the outputs stands for a tensor
        self.outputs: list[Tensor] = []
        self.differentiable: list[int] = []  # places among the outputs
        self.output_gradients: list[Tensor] = []  # of these
        self.gradients: list[Tensor | None] = []  # as `wanted`
        self.turn = 0  # the number of forwards replayed
        self.has_activations = False  # of the newest of them

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        torch.cuda.synchronize(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield
        torch.cuda.synchronize(self.device)

    def run_forward(self) -> tuple[list[Any], TreeSpec]:
        with torch.set_grad_enabled(bool(self.wanted)):
            return tree_flatten(self.run())

    def run_backward(self, outputs: list[Tensor], given: list[Tensor]) -> list[Tensor | None]:
        """Gradients of what wants one, None where it has no part in the outputs."""
        with torch.autocast(self.device.type, enabled=False):  # as training loops call backward
            return list(torch.autograd.grad(outputs, self.wanted, given, allow_unused=True))

    def warm_up(self) -> None:
        """Runs everything that will be captured, outside of a capture."""
        with self.on_stream():
            for _ in range(WARMUP_RUNS):
                outputs = [t for t in self.run_forward()[0] if isinstance(t, Tensor) and t.requires_grad]
                if outputs:
                    self.run_backward(outputs, [torch.ones_like(t) for t in outputs])

    def record(self, what: str, graph: torch.cuda.CUDAGraph, body: Callable[[], Any]) -> Any:
        """What `body` returns, its launches recorded; an exception says what a graph cannot hold.

        Raises:
            CaptureError: anything was raised inside; that is its cause, and not what CUDA says of it afterwards.
            torch.OutOfMemoryError: as it was raised.
        """
        raised: list[Exception] = []
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                try:
                    return body()
                except Exception as error:
                    raised.append(error)
                    raise
        except Exception as error:
            cause = raised[0] if raised else error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise explanation(what, cause) from cause

    def capture(self) -> None:
        """Records forward and backward, after `warm_up`.

        Raises:
            CaptureError: something in it cannot be captured.
            TypeError: a result is neither a tensor nor a plain constant.
        """
        with self.on_stream():
            leaves, self.spec = self.record("forward", self.forward_graph, self.run_forward)
            check_result(leaves)
            outputs = [t for t in leaves if isinstance(t, Tensor)]
            self.leaves = [None if isinstance(t, Tensor) else t for t in leaves]
            self.places = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
            self.differentiable = [i for i, t in enumerate(outputs) if t.requires_grad]
            if self.differentiable:
                ends = [outputs[i] for i in self.differentiable]
                self.output_gradients = [torch.zeros_like(t) for t in ends]
                backward = partial(self.run_backward, ends, self.output_gradients)
                self.gradients = self.record("backward", self.backward_graph, backward)
            # the autograd graph must go: it would keep this stream as the one where gradients are accumulated
            self.outputs = [t.detach() for t in outputs]

    def replay(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for new inputs; to be called without grad mode."""
        for static, x in zip(self.inputs, given, strict=True):
            if static.data_ptr() != x.data_ptr():
                static.copy_(x)
        self.forward_graph.replay()
        self.turn += 1
        self.has_activations = True
        return [t.clone() if self.copy_outputs else t.detach() for t in self.outputs]

    def replay_backward(self, turn: int, given: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of all sources for those of all outputs; turn: of the forward that it belongs to.

        Raises:
            CaptureError: the activations are those of another forward by now, or a backward has used them up.
        """
        if turn != self.turn or not self.has_activations:
            cause = (
                f"another forward ran since its own ({self.turn - turn} of them)"
                if turn != self.turn
                else "it ran already"
            )
            raise CaptureError(
                f"fusedres.graphed: this backward cannot run, for {cause}: a graph holds the activations of one "
                "forward and hands them to one backward. Call backward before the next forward, or capture one "
                "callable for each forward of a step."
            )
        self.has_activations = False
        for place, mine in zip(self.differentiable, self.output_gradients, strict=True):
            if (dy := given[place]) is None:
                mine.zero_()
            else:
                mine.copy_(dy)
        self.backward_graph.replay()
        found = [g for g in self.gradients if g is not None]
        copies = [torch.empty_like(g) for g in found]
        torch._foreach_copy_(copies, found)
        left = iter(copies)
        by_source = {
            id(t): None if g is None else next(left) for t, g in zip(self.wanted, self.gradients, strict=True)
        }
        return [by_source.get(id(t)) for t in self.sources]

    def __call__(self, given: Sequence[Tensor]) -> Any:
        """The result for new inputs, with a gradient where one was captured and grad mode is on."""
        if self.differentiable and torch.is_grad_enabled():
            outputs: Sequence[Tensor] = Replay.apply(self, *given, *self.parameters)
        else:
            with torch.no_grad():
                outputs = self.replay(given)
        leaves = list(self.leaves)
        for place, output in zip(self.places, outputs, strict=True):
            leaves[place] = output
        return self.spec.unflatten(leaves)


class Replay(torch.autograd.Function):
    """apply(graphs, *sources) -> outputs: the inputs' new values, then the parameters themselves."""

    @staticmethod
    def forward(ctx: Any, graphs: CudaGraphs, *sources: Tensor) -> tuple[Tensor, ...]:
        outputs = graphs.replay(sources[: len(graphs.inputs)])
        ctx.graphs, ctx.turn = graphs, graphs.turn
        ctx.mark_non_differentiable(*(t for i, t in enumerate(outputs) if i not in graphs.differentiable))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.graphs.replay_backward(ctx.turn, given)


def check_result(leaves: Sequence[Any]) -> None:
    """Raises TypeError for what may hold tensors that nobody sees."""
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *CONSTANTS)):
            raise TypeError(
                f"fusedres.graphed: the model returns a {type(leaf).__name__}, needed are tensors and plain constants, "
                "in tuples, lists, dictionaries or what torch.utils._pytree knows; register the class there, or return "
                "its tensors."
            )
