"""Stands for `torch.cuda`'s graphs where there is no GPU: what runs in a capture is noted, and a replay runs it again.

    with stand_in(monkeypatch): graphed = fusedres.graphed(model, x)

As on a GPU, a replay works on the memory of the capture, runs no Python of the model, draws new random numbers, and
reads what the tensors of the capture hold by then. Unlike there, an op inside of a capture also computes something, and
memory that is freed in a capture is not taken by another tensor of it.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

READS_VALUES = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default}


class Recorder(TorchDispatchMode):
    """Notes every op with its arguments and results; an op that reads a value on the CPU is refused, as by CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS_VALUES:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")
        result = func(*args, **(kwargs or {}))
        held = lambda tree: tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, tree)  # noqa: E731
        self.calls.append((func, held(args), held(kwargs or {}), held(result)))
        return result


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.calls = []

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Capturing:
    """Whether a capture is under way, as `torch.cuda.is_current_stream_capturing` says."""

    def __init__(self) -> None:
        self.now = False
        self.captures = 0

    @contextmanager
    def graph(self, graph, pool=None, stream=None):
        assert not self.now, "one capture at a time"
        recorder, self.now = Recorder(), True
        try:
            with recorder:
                yield
        except Exception:
            # as `capture_end` does, in the place of what was raised
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            ) from None
        finally:
            self.now = False
            self.captures += 1
        graph.calls = recorder.calls


class Stream:
    """Stands for `torch.cuda.Stream`."""

    def __init__(self, device=None) -> None:
        self.device = device

    def wait_stream(self, other) -> None:
        """There is one stream."""


def install(monkeypatch) -> Capturing:
    """Puts the stand-ins into torch.cuda, and has `graphed` take the CPU for a GPU."""
    from fusedres.measuring import capturable

    capturing = Capturing()
    for name, value in {
        "CUDAGraph": Graph,
        "graph": capturing.graph,
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "synchronize": lambda device=None: None,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: capturing.now,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(capturable, "GPU", "cpu")
    return capturing
