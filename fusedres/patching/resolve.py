"""The modules of a patched block, by path, and whether they still are those that were found at patching.

A call resolves every module once and reads everything else from what this gives.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fusedres.matching.plan import Plan
from fusedres.modules import shadows
from fusedres.modules.contents import MISSING, same


def first_channels(block: nn.Module, plan: Plan) -> int | None:
    """Out of the block's first convolution; None where there is none such now."""
    module: Any = block
    for name in plan.main[0].conv.split("."):
        module = module._modules.get(name)
        if module is None:
            return None
    weight = module._parameters.get("weight")  # of a lazy convolution it has no shape yet
    found = isinstance(module, nn.Conv2d) and type(weight) in (Tensor, nn.Parameter)
    return weight.shape[0] if found else None


def method_replaced(plan: Plan) -> str | None:
    """A reason if a class of the block, or of a module below it, was given another method since."""
    for cls, name, function in plan.methods.known:
        if getattr(cls, name, None) is not function:
            return f"forward_replaced:{cls.__qualname__}.{name}"
    return None


def has_global_hooks() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def inside(path: str, name: object) -> str:
    """The path of an attribute or submodule of the module at `path`."""
    return f"{path}.{name}" if path else str(name)


def intervenes(module: nn.Module, state: dict[str, Any]) -> str | None:
    """A reason if a submodule does more when called than its class says; `state` is its `__dict__`."""
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "hooks"
    if "forward" in state and not shadows.is_own_forward(module):
        return "instance_forward"
    return None


def resolve(
    block: nn.Module, plan: Plan, harmless: dict[str, tuple[str, int]], compiling: bool
) -> dict[str, Any] | str:
    """Every module of the plan's structure by path, or the reason why it is not what was found at patching.

    harmless: by path, the newest attribute and the number of them once they were found to hide nothing; compiling: the
    call is traced by Dynamo, which watches names that it is asked for.
    """
    if has_global_hooks():
        return "hooks:on all modules"
    modules: dict[str, Any] = {}
    queue: list[Any]
    if plan.whole:
        # a non-full backward hook is given the gradients of the block's last operation, whatever that is
        if block._backward_hooks and not block._is_full_backward_hook:
            return "hooks:register_backward_hook of the block"
        queue = [block]
    else:
        for part in plan.structure:
            if part.path in block.__dict__:
                return f"instance_shadows:{part.path}"
        queue = [block._modules.get(part.path) for part in plan.structure]
    for found, module in zip(plan.structure, queue, strict=False):  # the queue grows
        path, cls, children, values, of_class, newest, _, _ = found
        if path:
            if type(module) is not cls:
                return f"module_replaced:{path}"
            if module is None:
                continue
        state = module.__dict__
        if path and (reason := intervenes(module, state)) is not None:
            return f"{reason}:{path}"
        if (compiling or next(reversed(state)) != newest) and (
            reason := shadows.new_attribute(module, found, harmless, compiling)
        ) is not None:
            return reason
        below = module._modules
        if (below or children) and tuple(below) != children:
            names = "its submodules" if compiling else ", ".join(sorted({*below} ^ {*children}) or children)
            return f"module_replaced:{inside(path, names)}"
        queue.extend(below.values())
        if values:
            for name, value in values:
                if not same(state.get(name, MISSING), value):
                    return f"attribute_changed:{inside(path, name)}"
        if of_class:
            for name, value in of_class:
                if not same(getattr(module, name, MISSING), value):
                    return f"attribute_changed:{inside(path, name)}"
        modules[path] = module
    return modules
