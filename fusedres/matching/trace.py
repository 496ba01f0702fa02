"""The torch calls of one run of a module, to be compared with another run's.

A run's calls, with their operands by where these came from, are the same wherever the forward takes the same path;
sizes do not stand in them. Submodules that a fused block calls too are one call each.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fusedres.matching import ambient
from fusedres.matching.dry_run import Listener, StandIn
from fusedres.modules.contents import SCALARS
from fusedres.modules.tree import FROZEN_TENSORS

SIZES = {"dim", "ndimension", "nelement", "numel", "shape", "size", "stride", "__len__", "ndim"}
DTYPES = {"dtype", "element_size", "is_floating_point", "itemsize", "nbytes", "type"}
LAYOUTS = {"is_contiguous", "stride"}
DEVICES = {"device", "get_device", "is_cpu", "is_cuda", "is_meta"}
ITS_DTYPE = "the input's dtype"  # stands for it, so that runs in other dtypes compare
READ_OF_TENSORS = SIZES | DTYPES | LAYOUTS | DEVICES
BATCH_NORM = inspect.signature(F.batch_norm)
VALUES = (*SCALARS, torch.dtype, torch.device, torch.layout, torch.memory_format, slice, type(Ellipsis))


class Trace(Listener):
    """The torch calls of one run, in order; those inside an opaque submodule apart.

    Batch normalisation is passed over: on meta tensors it takes longer than everything else.
    called: of the opaque submodules, those that a fused block calls too: their state and their errors are their own.
    enters_state: some call ran under another autocast, grad mode or the like than the forward was called in.
    reads_sizes: code that is not torch's read a tensor's size; reads: all that it read of tensors.
    failed_in: the torch call or the opaque submodule that raised, None where the module's own code did.
    """

    def __init__(self, names: dict[int, str], opaque: set[str], called: set[str], x: Tensor) -> None:
        super().__init__()
        self.labels = {**names, id(x): "X"}
        self.kept: list[Any] = [x]  # so that identities stay their own
        self.opaque, self.called = opaque, called
        self.state = ambient.state()
        self.dtype = x.dtype
        self.enters_state = self.reads_sizes = False
        self.reads: set[str] = set()
        self.failed_in: str | None = None
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
        inside = self.inside in self.called
        self.enters_state |= not inside and ambient.state() != self.state
        self.failed_in = self.inside if inside else name
        attribute = func.__self__.__name__ if name == "__get__" else name
        if (
            attribute in READ_OF_TENSORS
            and sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] != "torch"
        ):
            self.reads_sizes |= attribute in SIZES
            if not inside:
                self.reads.add(attribute)
        if func is F.batch_norm:
            bound = BATCH_NORM.bind(*args, **kwargs)
            bound.apply_defaults()
            args, kwargs = (), bound.arguments
            out = kwargs["input"].clone()
        else:
            out = func(*args, **kwargs)
        reads = name == "__get__" and not isinstance(out, Tensor)
        if not reads and name != "_set_grad_enabled":  # on leaving a context: what was before it
            self.add(f"{name} {attribute}" if name == "__get__" else name, args, kwargs, out)
        self.failed_in = self.inside if inside else None
        return out

    def add(self, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Notes a call, and where its results came from."""
        calls = self.calls if self.inside is None else self.within[self.inside]
        made = tuple(self.operand(t.dtype) for t in tree_leaves(out) if isinstance(t, Tensor))
        calls.append((name, self.operand(args), self.operand(kwargs), made))
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
        if value is self.dtype:
            return ITS_DTYPE
        return value if isinstance(value, VALUES) else type(value)


@torch.inference_mode(False)
def trace(
    stand_in: StandIn,
    shape: tuple[int, ...],
    training: bool,
    *,
    opaque: set[str],
    called: set[str],
    gradients: bool = True,
    inference: bool = False,
    within: AbstractContextManager[Any] | None = None,
    subclassed: bool = False,
    dtype: torch.dtype = torch.float64,
    layout: torch.memory_format | None = torch.contiguous_format,
) -> Trace:
    """One run on an input of that shape.

    gradients, inference, within: grad mode, inference mode and a context of the caller's; without gradients no
    parameter wants one either. subclassed: the module is of a subclass of its class, as a patched one is; dtype: of
    the input and the parameters; layout: of the input, None for one with gaps.

    Raises:
        DryRunError: as `StandIn.run`; its `trace` is how far the run came.
    """
    with torch.enable_grad():
        x = torch.empty(shape, device="meta", dtype=dtype, requires_grad=True)
    with (
        stand_in.held_in(dtype, gradients),
        torch.set_grad_enabled(gradients),
        torch.inference_mode(inference),
        within or nullcontext(),
    ):
        x = x * 1
        x = torch.cat([x, x], 3)[..., ::2] if layout is None else x.contiguous(memory_format=layout)
        found = Trace(stand_in.names, opaque, called, x)
        stand_in.run(x, training, found, subclassed)
    return found


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
        and (f"call {path}", (given["input"],), (), (ITS_DTYPE,)) in found.calls
    )
