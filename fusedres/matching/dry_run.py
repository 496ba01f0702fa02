"""A module's stand-in for dry runs, and what a run did besides computing.

The stand-in is a structural clone over meta tensors in float64, so that a hidden cast to float32 shows too. No kernel
runs; parameters, buffers, attributes and random states are as before afterwards. The constants of a frozen norm
(buffers weight, bias, running_mean, running_var) take part as parameters do, so that what is done to them shows.
"""

from __future__ import annotations

import pickle
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusedres.modules import shadows
from fusedres.modules.contents import Snapshot
from fusedres.modules.derived_class import BASE, STATE, base_class, derive, set_class
from fusedres.modules.lazy import is_uninitialised
from fusedres.modules.tree import FROZEN_TENSORS, is_frozen_norm

HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
EPS_PROBE = 0.0009765625  # stands for a frozen norm's attribute eps in a dry run


class DryRunError(Exception):
    """The module cannot be read; `code` is a reason code. failed_in: the torch call that its forward failed in."""

    def __init__(self, code: str, failed_in: str | None = None) -> None:
        super().__init__(code)
        self.code, self.failed_in = code, failed_in


class Listener(TorchFunctionMode):
    """What a dry run is held under: sees every torch function, and every call of a submodule.

    failed_in: the torch function or submodule that is running, for the time that it might raise; not every listener
    notes it.
    """

    failed_in: str | None = None

    def enter(self, path: str) -> None:
        """A submodule's forward begins."""

    def leave(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """It has returned."""


def structural_clone(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """The same tree of modules with the same attributes, without hooks and unpatched."""
    if id(module) in memo:
        return memo[id(module)]
    cls = base_class(module)
    clone = object.__new__(cls)
    memo[id(module)] = clone
    state = {k: v for k, v in vars(module).items() if k not in (STATE, "forward")}
    state |= {k: OrderedDict() for k in HOOK_DICTS if k in state}
    state |= {k: state[k].copy() for k in ("_parameters", "_buffers", "_non_persistent_buffers_set")}
    state["_modules"] = {
        name: None if child is None else structural_clone(child, memo)
        for name, child in module._modules.items()
    }
    clone.__dict__.update(state)
    return clone


def meta_like(tensor: Tensor) -> Tensor:
    dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, device="meta", dtype=dtype)


ASKED: set[int] = set()  # ids of modules of a probe class whose `__class__` was read


@cache
def probe_class(base: type) -> Any:
    """A subclass as patching makes, without a patch: it notes who asks for `self.__class__`.

    Eager calls are answered as unpatched; a compiler that traces the forward takes `type(self)` for the answer.
    """

    def own_class(self: nn.Module) -> type:
        ASKED.add(id(self))
        return base

    try:
        return derive(base, {"__class__": property(own_class), BASE: base})
    except TypeError as error:
        raise DryRunError(f"class_resists:{error}") from error


class RandomStates:
    """What Python, torch and, where it is loaded, NumPy draw from next."""

    def __init__(self) -> None:
        self.python, self.torch = random.getstate(), torch.get_rng_state()
        self.numpy = sys.modules["numpy.random"].get_state() if "numpy.random" in sys.modules else None

    def restore(self) -> bool:
        """Puts them back; returns whether anything had been drawn."""
        now = RandomStates()
        drawn = now.python != self.python or not torch.equal(now.torch, self.torch)
        if self.numpy is not None and pickle.dumps(now.numpy) != pickle.dumps(self.numpy):
            sys.modules["numpy.random"].set_state(self.numpy)
            drawn = True
        if drawn:
            random.setstate(self.python)
            torch.set_rng_state(self.torch)
        return drawn


class StandIn:
    """The clone of a module, to be run any number of times.

    modules: by path; frozen: paths of frozen norms; names: of parameters and buffers, by identity of the meta tensor.
    """

    @torch.inference_mode(False)
    def __init__(self, module: nn.Module) -> None:
        if is_uninitialised(module):
            raise DryRunError("uninitialised")
        tree = list(module.modules())
        if any(isinstance(m, (torch.jit.ScriptModule, torch.fx.GraphModule)) for m in tree):
            raise DryRunError("script_or_graph_module")
        for path, m in module.named_modules():
            if "forward" in vars(m) and not shadows.is_own_forward(m):
                raise DryRunError("instance_forward")
            if (name := shadows.shadowing(m)) is not None:
                raise DryRunError(f"instance_shadows:{path}.{name}" if path else f"instance_shadows:{name}")
        self.root = structural_clone(module, {})
        self.modules = dict(self.root.named_modules())
        self.frozen = {path for path, m in self.modules.items() if is_frozen_norm(m)}
        self.tensors: list[Tensor] = []
        self.names: dict[int, str] = {}
        self.give_meta_tensors()
        self.listener = Listener()
        self.before: dict[bool, Snapshot] = {}  # by mode
        self.asked_class = False
        for path, m in self.modules.items():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.__dict__["momentum"] = 0.1  # None would read a counter, which has no value on meta
            elif path in self.frozen and hasattr(m, "eps"):
                m.__dict__["eps"] = EPS_PROBE
            forward = partial(self.call, path, m.forward) if path else m.forward
            # calls by name too; and torch calls it past hooks on every module, which are the caller's
            m.__dict__["forward"] = m.__dict__["_compiled_call_impl"] = forward

    def give_meta_tensors(self) -> None:
        """Replaces every parameter and buffer, tied ones by one and the same."""
        memo: dict[int, Tensor] = {}
        for path, m in self.modules.items():
            for tensors in (m._parameters, m._buffers):
                for name, t in tensors.items():
                    if t is None:
                        continue
                    if id(t) not in memo:
                        memo[id(t)] = like = meta_like(t)
                        if isinstance(t, nn.Parameter):
                            memo[id(t)] = nn.Parameter(like)
                        elif path in self.frozen and name in FROZEN_TENSORS:
                            like.requires_grad_()
                        self.tensors.append(memo[id(t)])
                        self.names[id(memo[id(t)])] = f"{path}.{name}" if path else name
                    tensors[name] = memo[id(t)]

    @contextmanager
    def held_in(self, dtype: torch.dtype, gradients: bool) -> Iterator[None]:
        """Within it, floating parameters and buffers have that dtype, and without gradients no parameter wants one."""
        floating = [t for t in self.tensors if t.is_floating_point()]
        wanting = (
            [] if gradients else [t for t in floating if isinstance(t, nn.Parameter) and t.requires_grad]
        )
        try:
            for t in floating:
                t.data = t.data.to(dtype)
            for t in wanting:
                t.requires_grad_(False)
            yield
        finally:
            for t in floating:
                t.data = t.data.to(torch.float64)
            for t in wanting:
                t.requires_grad_()

    def call(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A submodule's forward, within the listener's sight."""
        self.listener.enter(path)
        out = forward(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self.listener.leave(path, args, kwargs, out)
        return out

    def run(self, x: Tensor, training: bool, listener: Listener, subclassed: bool = False) -> Any:
        """The output for x, the listener watching. subclassed: as a module of a subclass that passes for its class;
        `asked_class` then says whether the forward asked for `self.__class__`.

        Raises:
            DryRunError: the forward failed, drew random numbers, or stored something on the module.
        """
        self.listener = listener
        for m in self.modules.values():
            m.__dict__["training"] = training
        if training not in self.before:
            self.before[training] = Snapshot([m.__dict__ for m in self.modules.values()], self.tensors)
        randomness = RandomStates()
        failure = None
        cls: Any = type(self.root)
        if subclassed:
            set_class(self.root, probe_class(cls))
        ASKED.discard(id(self.root))
        try:
            with listener:
                out = self.root(x)
        except Exception as error:
            failure = DryRunError(f"dry_run_failed:{type(error).__name__}", listener.failed_in)
            failure.__cause__ = error
        set_class(self.root, cls)
        self.asked_class = id(self.root) in ASKED
        drawn, changed = randomness.restore(), self.before[training].restore()
        if failure is not None:
            raise failure
        if drawn:
            raise DryRunError("random")
        if changed:
            raise DryRunError("mutates_module")
        return out
