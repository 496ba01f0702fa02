"""What a CUDA graph takes for granted, and whether it still holds: a replay would compute something else in silence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path

from fusedres.errors import CaptureError
from fusedres.measuring.capturable import GPU, HOOKS


def autocast_now(device_type: str) -> torch.dtype | None:
    """The dtype of autocast, or None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


class InputForm:
    """The arguments that a graph was captured for: a pytree of tensors and constants.

    names: of the tensors, as "input[0]"; tensors: those of the example.
    """

    def __init__(self, args: tuple[Any, ...]) -> None:
        found, self.spec = tree_flatten_with_path(args)
        self.leaves = [leaf for _, leaf in found]
        self.all_names = [f"input{keystr(path)}" for path, _ in found]
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.names = [self.all_names[i] for i in self.places]
        self.tensors: list[Tensor] = [self.leaves[i] for i in self.places]
        # without the tensors themselves: they are the caller's
        self.constants = {i: leaf for i, leaf in enumerate(self.leaves) if i not in self.places}
        self.forms = [form(t) for t in self.tensors]
        self.gradients = [t.requires_grad for t in self.tensors]

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        leaves = list(self.leaves)
        for place, t in zip(self.places, tensors, strict=True):
            leaves[place] = t
        return self.spec.unflatten(leaves)

    def release(self) -> None:
        """Forgets the example's tensors, which would else live as long as the graph."""
        self.tensors, self.leaves = [], [self.constants.get(i) for i in range(len(self.leaves))]

    def check(self, args: tuple[Any, ...]) -> list[Tensor]:
        """The tensors of the arguments.

        Raises:
            TypeError: the arguments are other ones, or arranged in another way.
            ValueError: a tensor's shape, dtype, device or strides differ, or a constant.
            CaptureError: a tensor wants a gradient that was not captured.
        """
        found, spec = tree_flatten(args)
        if spec != self.spec:
            raise TypeError(
                f"fusedres.graphed: found arguments arranged as {spec}, captured were {self.spec}; call it with "
                "arguments like the example, or capture another callable for these."
            )
        given = []
        for i, leaf in enumerate(found):
            if i in self.constants:
                if type(leaf) is not type(self.constants[i]) or leaf != self.constants[i]:
                    raise ValueError(
                        f"fusedres.graphed: {self.all_names[i]} is {leaf!r}, captured was {self.constants[i]!r}; a "
                        "graph keeps constants as they were captured: capture another callable for this one."
                    )
                continue
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"fusedres.graphed: {self.all_names[i]} is a {type(leaf).__name__}, captured was a tensor; pass "
                    "one."
                )
            given.append(leaf)
        if [form(t) for t in given] != self.forms:
            self.refuse(given)
        if torch.is_grad_enabled():
            for name, t, captured in zip(self.names, given, self.gradients, strict=True):
                if t.requires_grad and not captured:
                    raise CaptureError(
                        f"fusedres.graphed: {name} requires a gradient, and none was captured for it; capture with an "
                        "example that requires one, or pass x.detach()."
                    )
        return given

    def refuse(self, given: Sequence[Tensor]) -> None:
        for name, t, captured in zip(self.names, given, self.forms, strict=True):
            for what, found, needed in zip(FORM, form(t), captured, strict=True):
                if found != needed:
                    raise ValueError(
                        f"fusedres.graphed: {name} has {what} {found}, captured was {needed}. A graph computes "
                        f"what it was captured for: {FORM[what]}, or capture another callable for these."
                    )


# what counts of a tensor, and how to bring another one into it
FORM = {
    "shape": "bring the batch to that size (drop_last=True in a DataLoader)",
    "dtype": "convert it with .to(dtype)",
    "device": "move it with .to(device)",
    "strides": "convert it, mostly by .to(memory_format=torch.channels_last) or .contiguous()",
}


def form(t: Tensor) -> tuple[list[int], torch.dtype, torch.device, list[int]]:
    """Shape, dtype, device and the strides that count: those of dimensions with more than one element."""
    shape = list(t.shape)
    return shape, t.dtype, t.device, [s for s, n in zip(t.stride(), shape, strict=True) if n > 1]


def same_objects(found: Sequence[Any], before: Sequence[Any]) -> bool:
    return len(found) == len(before) and all(map(is_, found, before))


class ModelState:
    """Modes, hooks and the places of all tensors of a model, as a graph was captured with them.

    Every call asks for all of it, so it is read from the modules' own dictionaries: 0.1 ms for a ResNet-50.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        own = [vars(m) for m in self.modules.values()]
        self.attributes = own
        self.hooks = [state[hooks] for state in own for hooks in HOOKS]
        self.children = [state["_modules"].values() for state in own]
        holders = [
            (name, state[kind])
            for kind in ("_parameters", "_buffers")
            for name, state in zip(self.modules, own, strict=True)
        ]
        self.holders = [holder.values() for _, holder in holders]
        self.names = [f"{path}.{name}" if path else name for path, holder in holders for name in holder]
        self.modes, self.parts, self.tensors = self.modes_now(), self.parts_now(), self.tensors_now()
        self.present = [t for t in self.tensors if t is not None]
        self.parameters = dict(model.named_parameters())
        self.places, self.gradients = self.places_now(), self.gradients_now()
        self.device_type = next((t.device.type for t in self.present), GPU)
        self.autocast = autocast_now(self.device_type)

    def modes_now(self) -> list[bool]:
        return [state["training"] for state in self.attributes]

    def parts_now(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(self.children))

    def tensors_now(self) -> list[Tensor | None]:
        return list(chain.from_iterable(self.holders))

    def places_now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.present))

    def gradients_now(self) -> list[bool]:
        return [p.requires_grad for p in self.parameters.values()]

    def check(self) -> None:
        """Raises CaptureError, naming what is another than it was."""
        if any(self.hooks):
            self.refuse("a hook was registered inside of the model, and a replay runs none", "remove it")
        if self.modes_now() != self.modes:
            self.refuse_modes()
        if not same_objects(self.parts_now(), self.parts):
            self.refuse("a submodule was added, removed or replaced", "put the old one back")
        if not same_objects(self.tensors_now(), self.tensors) or self.places_now() != self.places:
            self.refuse_tensors()
        if self.gradients_now() != self.gradients:
            self.refuse_gradients()
        found = autocast_now(self.device_type)
        if found is not self.autocast:
            self.refuse(
                f"autocast is {found or 'off'}, captured was {self.autocast or 'off'}",
                "call it in the autocast that it was captured in",
            )

    def refuse_modes(self) -> None:
        for (name, module), mode in zip(self.modules.items(), self.modes, strict=True):
            if module.training is not mode:
                modes = ("training", "evaluation") if module.training else ("evaluation", "training")
                self.refuse(
                    f"{name or 'the model'} is in {modes[0]} mode, captured was {modes[1]} mode",
                    f"call .train({mode}) on it, or the model itself in its new mode (.module)",
                )

    def refuse_tensors(self) -> None:
        found = self.tensors_now()
        if len(found) != len(self.tensors):
            self.refuse("a parameter or buffer was added or removed", "undo that")
        places = dict(zip(map(id, self.present), self.places, strict=True))
        for name, t, before in zip(self.names, found, self.tensors, strict=True):
            if t is not before or (t is not None and t.data_ptr() != places[id(t)]):
                self.refuse(
                    f"{name} is in other memory than it was captured in (by .to(), load_state_dict(assign=True) or an "
                    "assignment)",
                    "copy values into the old tensor: parameter.data.copy_(values)",
                )

    def refuse_gradients(self) -> None:
        for name, found, captured in zip(self.parameters, self.gradients_now(), self.gradients, strict=True):
            if found is not captured:
                self.refuse(f"{name}.requires_grad is {found}, captured was {captured}", "set it back")

    def refuse(self, found: str, fix: str) -> None:
        raise CaptureError(
            f"fusedres.graphed: {found}; {fix}, or capture again: fusedres.graphed(model, example)."
        )


def replaced_buffer(model: nn.Module, before: dict[str, Tensor]) -> str | None:
    """The name of a buffer that is another tensor than before."""
    now = dict(model.named_buffers())
    return next((name for name, buffer in now.items() if buffer is not before.get(name)), None)
