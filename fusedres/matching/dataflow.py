"""What a module computes, read from autograd: one run on meta tensors, then a walk over `grad_fn`.

Every spelling of a residual block (`out += x`, `torch.add`, `F.relu`, one shared ReLU, a norm hidden in a Conv2d
subclass) gives the same expression.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fusedres.matching.dry_run import DryRunError, Listener, StandIn

INPUT = "X"
PARAMETER = "%"
ADDITIONS = ("add", "__add__", "__radd__", "add_", "__iadd__")
MOVES_BUFFERS = ("batch_norm", "instance_norm")  # running statistics, past version counters
SPATIAL = 32  # height and width of the dry run's input: enough for any stride and dilation of one block


@dataclass(eq=False)
class Node:
    """One operation of the expression: its name without "Backward0", its operands, its output's shape."""

    op: str
    args: tuple[Node | None, ...] = ()
    name: str | None = None  # of a parameter
    shape: tuple[int, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)

    def walk(self) -> list[Node]:
        """This node and all below it, each once."""
        seen: dict[int, Node] = {}
        stack = [self]
        while stack:
            node = stack.pop()
            if id(node) not in seen:
                seen[id(node)] = node
                stack.extend(arg for arg in node.args if arg is not None)
        return list(seen.values())


@dataclass
class Dataflow:
    """The expression of a module's output, and which submodule call made which node.

    made_in: id(node) -> path of the innermost submodule that made it; calls: of the innermost one that returned it;
    calls_on_input: of the outermost one whose only argument was X. outputs: of each submodule, id(node) of what each
    of its calls returned. written: names of the parameters and buffers that were written.
    """

    root: Node
    made_in: dict[int, str]
    calls: dict[int, str]
    calls_on_input: dict[int, str]
    outputs: dict[str, list[int | None]]
    written: set[str]
    input_shape: tuple[int, ...]


def saving_hooks() -> Any:
    """The innermost hooks on what autograd saves, if any."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class Observer(Listener):
    """Sees every torch function of the run, and which submodule's call it lies in.

    numbers: what an addition of a tensor and a number adds, by its autograd node, which does not keep it;
    packs: some of it ran under hooks on what autograd saves, as non-reentrant checkpointing does;
    made_in, calls, calls_on_input, outputs: as in `Dataflow`, by autograd node;
    written: parameters and buffers that were written; unseen: something else was, which autograd did not note.
    """

    def __init__(self, names: dict[int, str], tensors: list[Tensor], x: Tensor) -> None:
        super().__init__()
        self.x = x
        self.numbers: dict[Any, float] = {}
        self.hooks = saving_hooks()
        self.packs = self.unseen = False
        self.running = [""]
        self.made_in: dict[Any, str] = {}
        self.calls: dict[Any, str] = {}
        self.calls_on_input: dict[Any, str] = {}
        self.outputs: dict[str, list[Any]] = {}
        self.written: set[str] = set()
        self.stored = {storage(t): names[id(t)] for t in tensors}
        self.traced, self.kept = {storage(x)}, [x]

    def enter(self, path: str) -> None:
        self.running.append(path)

    def leave(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.running.pop()
        fn = out.grad_fn if isinstance(out, Tensor) else None
        self.outputs.setdefault(path, []).append(fn)
        if fn is not None:
            self.calls.setdefault(fn, path)
            if len(args) == 1 and args[0] is self.x and not kwargs:
                self.calls_on_input[fn] = path

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.packs |= saving_hooks() != self.hooks
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        before = [(t, storage(t), t._version, t.grad_fn) for t in given]
        out = func(*args, **kwargs)
        for t, stored, version, fn in before:
            # autograd notes a write by a new node
            hidden = name == "__set__" or (t._version != version and t.grad_fn is fn)
            self.unseen |= hidden and stored in self.traced
            if stored in self.stored and (hidden or (name in MOVES_BUFFERS and not t.requires_grad)):
                self.written.add(self.stored[stored])
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.grad_fn is not None:
                self.made_in.setdefault(t.grad_fn, self.running[-1])
                self.traced.add(storage(t))
                self.kept.append(t)  # its memory's address stays its own
        if name in ADDITIONS and not kwargs and isinstance(out, Tensor):
            numbers = [a for a in args if type(a) in (int, float)]
            if len(args) == 2 and len(numbers) == 1 and out.grad_fn is not None:
                self.numbers[out.grad_fn] = numbers[0]
        return out


def storage(tensor: Tensor) -> int:
    """The identity of a tensor's memory, which its views and `.data` share."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


@torch.inference_mode(False)
@torch.enable_grad()
def read(stand_in: StandIn, channels: int, training: bool) -> Dataflow:
    """The dataflow of a module on an input of that many channels, in training or evaluation mode.

    Raises:
        DryRunError: with the reason code, if its output is no single tensor or its forward has side effects.
    """
    shape = (2, channels, SPATIAL, SPATIAL)
    x = torch.empty(shape, device="meta", dtype=torch.float64, requires_grad=True) * 1
    observer = Observer(stand_in.names, stand_in.tensors, x)
    out = stand_in.run(x, training, observer)
    if x._version:
        raise DryRunError("mutates_input")
    if observer.packs:
        raise DryRunError("checkpointed")
    if observer.unseen:
        raise DryRunError("hidden_write")
    if not isinstance(out, Tensor) or out.grad_fn is None:
        raise DryRunError("not_residual")
    nodes: dict[Any, Node] = {}
    root = expression(out.grad_fn, x.grad_fn, stand_in.names, nodes)
    for fn, number in observer.numbers.items():
        if fn in nodes:
            nodes[fn].attributes["number"] = number
    made_in, calls, on_input = (
        {id(nodes[fn]): path for fn, path in found.items() if fn in nodes}
        for found in (observer.made_in, observer.calls, observer.calls_on_input)
    )
    outputs = {
        path: [id(nodes[fn]) if fn in nodes else None for fn in fns] for path, fns in observer.outputs.items()
    }
    return Dataflow(root, made_in, calls, on_input, outputs, observer.written, shape)


def expression(fn: Any, input_fn: Any, names: dict[int, str], nodes: dict[Any, Node]) -> Node:
    """The node of an autograd function and, recursively, of its operands."""
    if fn in nodes:
        return nodes[fn]
    kind = type(fn).__name__
    if fn is input_fn:
        node = Node(INPUT)
    elif kind == "AccumulateGrad":
        node = Node(PARAMETER, name=names.get(id(fn.variable)))
    else:
        args = tuple(
            None if g is None else expression(g, input_fn, names, nodes) for g, _ in fn.next_functions
        )
        node = Node(
            kind.removesuffix("Backward0"),
            args,
            None,
            tuple(fn._input_metadata[0].shape),
            saved(fn, kind, names),
        )
    nodes[fn] = node
    return node


def saved(fn: Any, kind: str, names: dict[int, str]) -> dict[str, Any]:
    """What the matcher needs of a node beyond its operands."""
    if kind == "ConvolutionBackward0":
        fields = ("stride", "padding", "dilation", "groups", "transposed")
        return {name: getattr(fn, f"_saved_{name}") for name in fields}
    if kind == "NativeBatchNormBackward0":
        return {
            "training": fn._saved_training,
            "eps": fn._saved_eps,
            "running_mean": names.get(id(fn._saved_running_mean)),
        }
    if kind == "MaxPool2DWithIndicesBackward0":
        fields = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        return {name: getattr(fn, f"_saved_{name}") for name in fields}
    return {"alpha": fn._saved_alpha} if kind in ("AddBackward0", "SubBackward0") else {}
