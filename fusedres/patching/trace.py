"""Whether a module does the same at other sizes and without gradients: the torch calls of several runs, compared.

The dataflow is that of one size, and without gradients there is none to read. A run's calls, with their operands by
where these came from, are the same wherever the forward takes the same path; sizes do not stand in them. Submodules
that a fused block calls too are one call each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fusedres.patching.contents import SCALARS
from fusedres.patching.dry_run import FROZEN_TENSORS, DryRunError, Listener, StandIn

Shape = tuple[int, int, int]  # of an input: N, H, W
FIRST: Shape = (2, 32, 32)
OTHERS: tuple[tuple[Shape, ...], ...] = (  # of each, the first that the module takes
    ((3, 9, 7), (3, 12, 8), (3, 48, 24)),
    ((40, 224, 160),),
)
WITHOUT_GRADIENTS: tuple[Shape, ...] = ((1, 32, 32),)
BATCH_NORM = inspect.signature(F.batch_norm)
VALUES = (*SCALARS, torch.dtype, torch.device, torch.layout, torch.memory_format, slice, type(Ellipsis))


class Trace(Listener):
    """The torch calls of one run, in order; those inside an opaque submodule apart.

    Batch normalisation is passed over: on meta tensors it takes longer than everything else.
    """

    def __init__(self, names: dict[int, str], opaque: set[str], x: Tensor) -> None:
        super().__init__()
        self.labels = {**names, id(x): "X"}
        self.kept: list[Any] = [x]  # so that identities stay their own
        self.opaque = opaque
        self.inside: str | None = None
        self.calls: list[tuple[Any, ...]] = []
        self.within: dict[str, list[tuple[Any, ...]]] = {path: [] for path in opaque}

    def enter(self, path: str) -> None:
        if self.inside is None and path in self.opaque:
            self.inside = path

    def leave(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if self.inside == path:
            self.inside = None
            self.add("call " + path, args, kwargs, out)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is F.batch_norm:
            bound = BATCH_NORM.bind(*args, **kwargs)
            bound.apply_defaults()
            args, kwargs = (), bound.arguments
            out = kwargs["input"].clone()
        else:
            out = func(*args, **kwargs)
        reads = name == "__get__" and not isinstance(out, Tensor)
        if not reads and name != "_set_grad_enabled":  # on leaving a context: what was before it
            self.add(f"{name} {func.__self__.__name__}" if name == "__get__" else name, args, kwargs, out)
        return out

    def add(self, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Notes a call, and where its results came from."""
        calls = self.calls if self.inside is None else self.within[self.inside]
        calls.append((name, self.operand(args), self.operand(kwargs)))
        for i, t in enumerate(tree_leaves(out)):
            if isinstance(t, Tensor) and (self.labels.get(id(t)) is None or name.startswith("call ")):
                self.labels[id(t)] = f"{self.inside or ''} {len(calls)}.{i}"
                self.kept.append(t)

    def operand(self, value: Any) -> Any:
        """A call's operand, to be compared with another run's."""
        if isinstance(value, Tensor):
            return self.labels.get(id(value), "a tensor of unknown origin")
        if isinstance(value, (list, tuple)):
            return tuple(self.operand(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, self.operand(v)) for k, v in value.items())
        return value if isinstance(value, VALUES) else type(value)


@torch.inference_mode(False)
def trace(
    stand_in: StandIn, shape: tuple[int, ...], training: bool, gradients: bool, opaque: set[str]
) -> Trace:
    with torch.enable_grad():
        x = torch.empty(shape, device="meta", dtype=torch.float64, requires_grad=True)
    with torch.set_grad_enabled(gradients):
        x = x * 1
        found = Trace(stand_in.names, opaque, x)
        stand_in.run(x, training, found)
    return found


def check_every_path(stand_in: StandIn, channels: int, norms: dict[str, float], modules: set[str]) -> None:
    """Holds other sizes, and calls without gradients, against the first size, in both modes.

    norms: the block's frozen norms, with their eps: without gradients they may call torch's batch_norm instead;
    modules: submodules that the fused block calls too.

    Raises:
        DryRunError: the module does something else there.
    """

    def run(shape: Shape, training: bool, gradients: bool = True) -> Trace:
        n, height, width = shape
        return trace(stand_in, (n, channels, height, width), training, gradients, {*norms, *modules})

    for training in (True, False):
        first = run(FIRST, training)
        for shapes in OTHERS:
            other = first_that_runs(partial(run, training=training), shapes, "shape_dependent")
            if other.calls != first.calls or any(other.within[norm] != first.within[norm] for norm in norms):
                raise DryRunError("shape_dependent")
        without = partial(run, training=training, gradients=False)
        other = first_that_runs(without, WITHOUT_GRADIENTS, "grad_mode_dependent")
        constant = all(
            other.within[norm] == first.within[norm] or is_constant_norm(other, norm, eps)
            for norm, eps in norms.items()
        )
        if other.calls != first.calls or not constant:
            raise DryRunError("grad_mode_dependent")


def first_that_runs(run: Callable[[Shape], Trace], shapes: tuple[Shape, ...], code: str) -> Trace:
    """The run of the first shape that the module takes.

    Raises:
        DryRunError: it takes none (`code`), or does what no forward of a block may do.
    """
    for shape in shapes:
        try:
            return run(shape)
        except DryRunError as error:
            if not error.code.startswith("dry_run_failed"):
                raise
    raise DryRunError(code)


def is_constant_norm(found: Trace, path: str, eps: float) -> bool:
    """Whether all that the module did was torch's batch_norm of its argument by its own constants."""
    calls = found.within[path]
    if len(calls) != 1 or calls[0][0] != "batch_norm":
        return False
    given = dict(calls[0][2])
    own = all(given[name] == f"{path}.{name}" for name in FROZEN_TENSORS)
    return (
        own
        and given["training"] is False
        and given["eps"] == eps
        and (f"call {path}", (given["input"],), ()) in found.calls
    )
