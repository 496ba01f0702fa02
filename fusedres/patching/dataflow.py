"""What a module computes, read from autograd: one run on meta tensors, then a walk over `grad_fn`.

Every spelling of a residual block (`out += x`, `torch.add`, `F.relu`, one shared ReLU, a norm hidden in a Conv2d
subclass) gives the same expression. No kernel runs, and the module, its buffers and the random state stay untouched:
the run is on a structural clone in float64, so that a hidden cast to float32 shows too. The constants of a frozen
norm (buffers weight, bias, running_mean, running_var) take part as parameters do, so that what is done to them shows.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from fusedres.patching.plan import BASE, STATE

INPUT = "X"
PARAMETER = "%"
HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
FROZEN_TENSORS = ("weight", "bias", "running_mean", "running_var")
EPS_PROBE = 0.0009765625  # stands for a frozen norm's attribute eps in the dry run
ADDITIONS = ("add", "__add__", "__radd__", "add_", "__iadd__")
SPATIAL = 32  # height and width of the dry run's input: enough for any stride and dilation of one block


class DryRunError(Exception):
    """The module's dataflow cannot be read; `code` is a reason code."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


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

    calls: id(node) -> path of the innermost submodule that returned it; calls_on_input: the outermost one whose
    only argument was X.
    """

    root: Node
    calls: dict[int, str]
    calls_on_input: dict[int, str]
    input_shape: tuple[int, ...]


def structural_clone(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """The same tree of modules over the same parameters, without hooks and unpatched: what a forward writes lands on
    the clone."""
    if id(module) in memo:
        return memo[id(module)]
    cls = getattr(type(module), BASE, type(module))
    clone = cls.__new__(cls)
    memo[id(module)] = clone
    clone.__dict__.update(
        {
            k: v.copy() if isinstance(v, (dict, list, set)) else v
            for k, v in vars(module).items()
            if k != STATE
        }
    )
    for hooks in HOOK_DICTS:
        if hooks in clone.__dict__:
            clone.__dict__[hooks] = OrderedDict()
    clone.__dict__["_modules"] = {
        name: None if child is None else structural_clone(child, memo)
        for name, child in module._modules.items()
    }
    return clone


def meta_like(tensor: Tensor) -> Tensor:
    dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, device="meta", dtype=dtype)


def plain_state(module: nn.Module) -> list[tuple[int, str, int, int]]:
    """Identities of everything a forward could store, over the tree."""
    kept = ("_parameters", "_buffers", "_modules", *HOOK_DICTS)
    return [
        (id(m), k, id(v), len(v) if isinstance(v, (dict, list, set)) else 0)
        for m in module.modules()
        for k, v in vars(m).items()
        if k not in kept
    ]


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether it holds a BN's four vectors without being one of torch's; what it does with them, the dataflow says."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) or module._modules:
        return False
    tensors = [module._parameters.get(name, module._buffers.get(name)) for name in FROZEN_TENSORS]
    return all(isinstance(t, Tensor) and t.is_floating_point() and t.dim() == 1 for t in tensors) and (
        len({t.shape for t in tensors}) == 1  # type: ignore[union-attr]
    )


def saving_hooks() -> Any:
    """The innermost hooks on what autograd saves, if any."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class Observer(TorchFunctionMode):
    """Sees every torch function of the run.

    numbers: what an addition of a tensor and a number adds, by its autograd node, which does not keep it;
    packs: some of it ran under hooks on what autograd saves, as non-reentrant checkpointing does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[Any, float] = {}
        self.hooks = saving_hooks()
        self.packs = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.packs |= saving_hooks() != self.hooks
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ADDITIONS and not kwargs and isinstance(out, Tensor):
            numbers = [a for a in args if type(a) in (int, float)]
            if len(args) == 2 and len(numbers) == 1 and out.grad_fn is not None:
                self.numbers[out.grad_fn] = numbers[0]
        return out


class CallRecorder:
    """Hooks on the clone that note which submodule returned which autograd node."""

    def __init__(self, clone: nn.Module, x: Tensor) -> None:
        self.x = x
        self.calls: dict[Any, str] = {}
        self.calls_on_input: dict[Any, str] = {}
        for path, child in clone.named_modules():
            if path:
                child.register_forward_hook(partial(self.record, path))

    def record(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self.calls.setdefault(output.grad_fn, path)
            if len(args) == 1 and args[0] is self.x:
                self.calls_on_input[output.grad_fn] = path


def prepare(clone: nn.Module, training: bool) -> set[str]:
    """Puts the clone in that mode; returns the names of the buffers that its frozen norms compute with."""
    frozen = set()
    for path, m in clone.named_modules():
        m.__dict__["training"] = training
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.__dict__["momentum"] = 0.1  # None would read a counter, which has no value on meta
        elif is_frozen_norm(m):
            frozen |= {f"{path}.{name}" if path else name for name in FROZEN_TENSORS}
            if hasattr(m, "eps"):
                m.__dict__["eps"] = EPS_PROBE
    return frozen


@torch.inference_mode(False)
@torch.enable_grad()
def read(module: nn.Module, channels: int, training: bool) -> Dataflow:
    """The dataflow of `module` on an input of that many channels, in training or evaluation mode.

    Raises:
        DryRunError: with the reason code, if its output is no single tensor or its forward has side effects.
    """
    tree = list(module.modules())
    if any(isinstance(m, (torch.jit.ScriptModule, torch.fx.GraphModule)) for m in tree):
        raise DryRunError("script_or_graph_module")
    if any("forward" in vars(m) for m in tree):
        raise DryRunError("instance_forward")
    clone = structural_clone(module, {})
    frozen = prepare(clone, training)
    state: dict[str, Tensor] = {k: nn.Parameter(meta_like(p)) for k, p in clone.named_parameters()}
    names: dict[int, str] = {id(p): k for k, p in state.items()}
    state |= {k: meta_like(b).requires_grad_(k in frozen) for k, b in clone.named_buffers()}
    names |= {id(b): k for k, b in state.items()}
    observer = Observer()
    shape = (2, channels, SPATIAL, SPATIAL)
    x = torch.empty(shape, device="meta", dtype=torch.float64, requires_grad=True) * 1
    recorder = CallRecorder(clone, x)
    before, python_rng, torch_rng = plain_state(clone), random.getstate(), torch.get_rng_state()
    try:
        with observer:
            out = functional_call(clone, state, (x,))
    except Exception as error:
        raise DryRunError(f"dry_run_failed:{type(error).__name__}") from error
    if random.getstate() != python_rng or not torch.equal(torch.get_rng_state(), torch_rng):
        random.setstate(python_rng)
        torch.set_rng_state(torch_rng)
        raise DryRunError("random")
    if plain_state(clone) != before:
        raise DryRunError("mutates_module")
    if x._version:
        raise DryRunError("mutates_input")
    if observer.packs:
        raise DryRunError("checkpointed")
    if not isinstance(out, Tensor) or out.grad_fn is None:
        raise DryRunError("not_residual")
    nodes: dict[Any, Node] = {}
    root = expression(out.grad_fn, x.grad_fn, names, nodes)
    for fn, number in observer.numbers.items():
        if fn in nodes:
            nodes[fn].attributes["number"] = number
    calls, on_input = (
        {id(nodes[fn]): path for fn, path in found.items() if fn in nodes}
        for found in (recorder.calls, recorder.calls_on_input)
    )
    return Dataflow(root, calls, on_input, shape)


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
