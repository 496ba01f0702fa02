"""patch, unpatch, is_patched, report: finds the residual blocks of a model and installs recipes on them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fusedres.blocks.choice import AUTO, check_recipe
from fusedres.dispatch import AUTO as AUTO_BACKEND
from fusedres.dispatch import check_backend
from fusedres.errors import UnsupportedModelError
from fusedres.patching import grammar, install, stems
from fusedres.patching.grammar import NoMatch
from fusedres.patching.install import BlockState
from fusedres.patching.plan import Plan
from fusedres.patching.report import BlockReport, PatchReport

Model = TypeVar("Model", bound=nn.Module)
Patterns = str | Iterable[str] | None

logger = logging.getLogger("fusedres")
_dry_runs: WeakKeyDictionary[nn.Module, PatchReport] = WeakKeyDictionary()

STEM = "stem"  # the name under which a model's own stem is reported
WRAPPERS = {
    "DataParallel": "patch the inner module: fusedres.patch(model.module)",
    "DistributedDataParallel": "patch the inner module before wrapping, or model.module",
    "FullyShardedDataParallel": "call fusedres.patch(model) before wrapping it",
    "OptimizedModule": "call fusedres.patch(model) first, then torch.compile(model)",
}


class Found(NamedTuple):
    """A module that looks like a residual block: its plan, or why it has none."""

    name: str
    module: nn.Module
    plan: Plan | None
    code: str | None


def check_model(model: object, caller: str) -> None:
    """Raises TypeError for what is no module, UnsupportedModelError for a wrapper, naming the right order."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fusedres.{caller}: needs a torch.nn.Module, found {type(model).__name__}; pass the model itself"
        )
    for cls in type(model).__mro__:
        advice = WRAPPERS.get(cls.__name__)
        if advice is not None and cls.__module__.startswith("torch."):
            raise UnsupportedModelError(
                f"fusedres.{caller}: the model is wrapped by {cls.__name__}; {advice}."
            )
        if cls.__name__ == "FSDPModule":
            raise UnsupportedModelError(
                f"fusedres.{caller}: the model is sharded by fully_shard; call fusedres.patch(model) before it."
            )
    if isinstance(model, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        raise UnsupportedModelError(
            f"fusedres.{caller}: the model is a {type(model).__name__}; patch the Python model before converting it."
        )


def shared_modules(model: nn.Module) -> set[int]:
    """Identities of modules registered under more than one parent or name."""
    seen: set[int] = set()
    shared: set[int] = set()
    for parent in model.modules():
        for child in parent._modules.values():
            if child is not None:
                (shared if id(child) in seen else seen).add(id(child))
    return shared


def find_plan(module: nn.Module, shared: set[int], renew: bool) -> Plan | None:
    """The plan of a whole module; of a patched one the known plan, or with `renew` found anew. None if it looks like
    nothing. Raises NoMatch."""
    known: Plan | None = vars(module)[install.STATE].plan if install.is_patched_block(module) else None
    if known is not None and known.whole and not renew:
        return known
    plan: Plan
    if grammar.looks_residual(module):
        plan = grammar.plan(install.original_view(module))
    elif stems.looks_like_stem(module):
        plan = stems.plan_stem_module(install.original_view(module))
    else:
        return None
    units = [module.get_submodule(path) for unit in plan.units for path in (unit.conv, unit.bn)]
    if any(id(unit) in shared for unit in units):
        raise NoMatch("shared_module")
    return plan


def find_stem(name: str, model: nn.Module) -> Found:
    if install.is_patched_block(model):
        return Found(name, model, vars(model)[install.STATE].plan, None)
    try:
        return Found(name, model, stems.plan_stem(model, install.base_class(model)), None)
    except NoMatch as refusal:
        return Found(name, model, None, refusal.code)


def find(model: nn.Module, renew: bool = False) -> list[Found]:
    """The residual blocks of the model, outermost first, and the innermost modules that only look like one.

    renew: look at patched blocks again, for what changed in them since.
    """
    shared, seen = shared_modules(model), set()

    def visit(name: str, module: nn.Module) -> Iterator[Found]:
        if id(module) in seen:
            return
        seen.add(id(module))
        code = None
        if stems.has_stem(install.base_class(module)):
            yield find_stem(f"{name}.{STEM}" if name else STEM, module)
        try:
            if (plan := find_plan(module, shared, renew)) is not None:
                yield Found(name, module, plan, None)
                return
        except NoMatch as refusal:
            # few modules with one convolution are stems: only an activation says that this one was meant as one
            is_block = grammar.looks_residual(module) or refusal.code.startswith("activation_not_relu")
            code = refusal.code if is_block else None
        below = [
            found
            for child_name, child in module.named_children()
            for found in visit(f"{name}.{child_name}" if name else child_name, child)
        ]
        if code not in (None, "not_residual") and not below:
            yield Found(name, module, None, code)
        yield from below

    return list(visit("", model))


def selects(patterns: Patterns, name: str) -> bool:
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns or ())
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def describe(found: Found, planned: BlockState | None = None) -> BlockReport:
    """A found module's row: what a patched block runs as, or, with `planned`, what it would be given."""
    state: BlockState | None = vars(found.module).get(install.STATE) if planned is None else planned
    matched = state is not None and found.plan is not None
    return BlockReport(
        name=found.name,
        class_name=install.base_class(found.module).__name__,
        form="" if found.plan is None else found.plan.form,
        matched=matched,
        recipe=state.recipe if state and matched else None,
        backend=state.backend if state and matched else None,
        runs_as=state.runs_as if state and matched else None,
        code=state.reason if state and matched else found.code,
    )


def patch(
    model: Model,
    *,
    backend: str = AUTO_BACKEND,
    recipe: str = AUTO,
    include: Patterns = None,
    exclude: Patterns = None,
    strict: bool = False,
    dry_run: bool = False,
) -> Model:
    """Makes every residual block of the model run fused, in place.

    The patched model is the same model: same outputs, gradients, running statistics, state_dict keys, parameters
    and hooks. Blocks that no recipe reproduces exactly are left alone; `report(model)` says which and why.

    Args:
        model: any module; residual blocks are found by what they compute, not by name.
        backend: "auto", or a name of `fusedres.dispatch.backend_names()`.
        recipe: "auto" (per call, the fastest one measured), "separate", "gram" or "unfused".
        include, exclude: names of blocks, as fnmatch patterns ("layer1.*"); all by default.
        strict: raise if any residual block cannot be patched.
        dry_run: change nothing; `report(model)` then tells what would be.

    Returns:
        The same model.

    Raises:
        TypeError: not a module.
        UnsupportedModelError: a wrapped model, no residual block at all, or, with `strict`, one left alone.
        ValueError, BackendUnavailableError: unknown recipe or backend.
        The model is unchanged after any of them.
    """
    check_model(model, "patch")
    check_recipe(recipe)
    check_backend(backend)
    found = [choose_block(f, include, exclude) for f in find(model, renew=True)]
    if not found:
        raise UnsupportedModelError(
            f"fusedres.patch: no residual block found in {type(model).__name__}; it needs modules that compute "
            "relu(BN(conv(...)) + shortcut) from one tensor."
        )
    left = [f for f in found if f.plan is None and f.code != "excluded"]
    if strict and left:
        listed = ", ".join(f"{f.name or 'the model'} [{f.code}]" for f in left)
        raise UnsupportedModelError(
            f"fusedres.patch(strict=True): {len(left)} of {len(found)} blocks cannot be patched: {listed}. "
            "Exclude them by name, or patch without strict."
        )
    if dry_run:
        _dry_runs[model] = PatchReport(
            tuple(describe(f, f.plan and BlockState(f.plan, recipe, backend)) for f in found)
        )
        return model
    _dry_runs.pop(model, None)
    for f in found:
        if f.plan is not None:
            install.install(f.module, BlockState(f.plan, recipe, backend))
        elif install.is_patched_block(f.module):
            install.remove(f.module)
    matched = sum(f.plan is not None for f in found)
    logger.info("patched %d of %d residual blocks of %s", matched, len(found), type(model).__name__)
    return model


def choose_block(found: Found, include: Patterns, exclude: Patterns) -> Found:
    """The same, without its plan if include or exclude leave it out."""
    wanted = include is None or selects(include, found.name)
    if wanted and not selects(exclude, found.name):
        return found
    return found._replace(plan=None, code="excluded")


def patched_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if install.is_patched_block(m)]


def unpatch(model: Model) -> Model:
    """Restores the exact classes of every patched block, in place; returns the same model.

    Raises:
        TypeError: not a module.
        UnsupportedModelError: another tool changed a block's class since; nothing is restored then.
    """
    check_model(model, "unpatch")
    blocks = patched_blocks(model)
    for name, block in blocks:
        install.check_removable(name, block)
    for _, block in blocks:
        install.remove(block)
    _dry_runs.pop(model, None)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether any block of the model is patched."""
    return bool(patched_blocks(model))


def report(model: nn.Module) -> PatchReport:
    """Every residual block of the model: matched or not, what it runs as, and why.

    After `patch(model, dry_run=True)`: what patch would do.

    Raises:
        TypeError, UnsupportedModelError: as `patch`, for what is no plain module.
    """
    check_model(model, "report")
    if not is_patched(model) and model in _dry_runs:
        return _dry_runs[model]
    return PatchReport(tuple(describe(found) for found in find(model)))
