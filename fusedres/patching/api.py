"""patch, unpatch, is_patched, report: finds the residual blocks of a model and installs recipes on them."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from fusedres.blocks.choice import AUTO, TABLE, check_recipe
from fusedres.errors import UnsupportedModelError
from fusedres.ops.dispatch import AUTO as AUTO_BACKEND
from fusedres.ops.dispatch import check_backend, with_accuracy
from fusedres.ops.native import library
from fusedres.patching import install
from fusedres.patching.install import BlockState
from fusedres.patching.reasons import describe as reason
from fusedres.patching.report import BlockReport, PatchReport
from fusedres.patching.search import Found, Patterns, choose, find
from fusedres.trials.on_block import OnBlock
from fusedres.trials.whole_model import WholeModel

Model = TypeVar("Model", bound=nn.Module)

logger = logging.getLogger("fusedres")
_dry_runs: WeakKeyDictionary[nn.Module, PatchReport] = WeakKeyDictionary()
_excluded: WeakSet[nn.Module] = WeakSet()  # modules that the last patch left out by name

WRAPPERS = {
    "DataParallel": "patch the inner module: fusedres.patch(model.module)",
    "DistributedDataParallel": "patch the inner module before wrapping, or model.module",
    "FullyShardedDataParallel": "call fusedres.patch(model) before wrapping it",
    "OptimizedModule": "call fusedres.patch(model) first, then torch.compile(model)",
    "FSDPModule": "call fusedres.patch(model) before fully_shard",
    "Graphed": "patch the model before fusedres.graphed captures it; the model itself is .module",
}


def check_module(model: object, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fusedres.{caller}: needs a torch.nn.Module, found {type(model).__name__}; pass the model itself"
        )


def wrapper_of(model: object) -> str | None:
    """The name in WRAPPERS of the class that the model is wrapped by, or was given by fully_shard."""
    for cls in type(model).__mro__:
        if cls.__name__ in WRAPPERS and cls.__module__.startswith(("torch.", "fusedres.")):
            return cls.__name__
    return None


def check_model(model: object, caller: str) -> None:
    """Raises TypeError for what is no module, UnsupportedModelError for a wrapper, naming the right order.

    What fully_shard was called on is still the model itself: its report can be read.
    """
    check_module(model, caller)
    wrapper = wrapper_of(model)
    if wrapper is not None and (wrapper, caller) != ("FSDPModule", "report"):
        how = "sharded by fully_shard" if wrapper == "FSDPModule" else f"wrapped by {wrapper}"
        raise UnsupportedModelError(f"fusedres.{caller}: the model is {how}; {WRAPPERS[wrapper]}.")
    if isinstance(model, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        raise UnsupportedModelError(
            f"fusedres.{caller}: the model is a {type(model).__name__}; patch the Python model before converting it."
        )


def is_passed_by(found: Found) -> bool:
    """Whether a model's blocks ran, but not the method with its stem."""
    state: BlockState | None = vars(found.module).get(install.STATE)
    if state is None or state.runs_as is not None or found.plan is None or found.plan.whole:
        return False
    below = (block for _, block in patched_blocks(found.module) if block is not found.module)
    return any(vars(block)[install.STATE].runs_as is not None for block in below)


def code_of(found: Found, state: BlockState | None) -> str | None:
    """The reason code of a row; state: of a module that is matched."""
    if state is not None:
        return "stem_not_called" if is_passed_by(found) else state.reason
    return "excluded" if found.module in _excluded else found.code


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
        code=code_of(found, state if matched else None),
        trial=state.on_trial.told if state and matched else None,
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
    channels_last: bool = False,
    accuracy: str = "fast",
) -> Model:
    """Makes every residual block of the model run fused, in place.

    The patched model is the same model: same outputs, gradients, running statistics, state_dict keys, parameters
    and hooks. Blocks that no recipe reproduces exactly are left alone; `report(model)` says which and why. What a
    forward does outside of the module, or reads there, is not seen: files, globals, iterators, arrays of other
    libraries.

    Args:
        model: any module; residual blocks are found by what they compute, not by name.
        backend: "auto", or a name of `fusedres.ops.dispatch.backend_names()`.
        recipe: "auto" (per call, the fastest one measured), "separate", "prologue", "gram" or "unfused".
        include: names of blocks, as fnmatch patterns ("layer1.*"); all by default.
        exclude: the same, of blocks to leave alone; none by default.
        strict: raise if any residual block cannot be patched; a stem may be left alone.
        dry_run: change nothing; `report(model)` then tells what would be.
        channels_last: bring the model's parameters into the layout that the kernels serve, as
            `model.to(memory_format=torch.channels_last)` does. Inputs may stay NCHW: a stem converts them.
        accuracy: "fast" keeps the error of every op, against float64, within the limit of `fusedres.ops.accuracy`;
            "strict" takes no algorithm of a convolution that has more error than a direct one.

    The model is unchanged after any exception. Where every block is left alone for another reason than its name, a
    warning says so.

    Returns:
        The same model.

    Raises:
        TypeError: not a module; `include` or `exclude` is no pattern.
        UnsupportedModelError: a wrapped model, no residual block at all, or, with `strict`, one left alone.
        ValueError, BackendUnavailableError: unknown recipe, backend or accuracy; `include` names no block.
    """
    check_model(model, "patch")
    check_recipe(recipe)
    check_backend(backend)
    backend = with_accuracy(backend, accuracy)
    if recipe == AUTO and not library.is_built() and library.could_be_built():
        warn_without_kernels()
    found = choose(find(model, renew=True), include, exclude)
    if not found:
        raise UnsupportedModelError(
            f"fusedres.patch: no residual block found in {type(model).__name__}; it needs modules that compute "
            "relu(BN(conv(...)) + shortcut) from one tensor."
        )
    left = [f for f in found if f.plan is None and f.code != "excluded"]
    refused = [f for f in left if not f.is_stem]
    if strict and refused:
        listed = ", ".join(f"{f.name or 'the model'} [{f.code}]" for f in refused)
        blocks = sum(not f.is_stem for f in found)
        raise UnsupportedModelError(
            f"fusedres.patch(strict=True): {len(refused)} of {blocks} blocks cannot be patched: {listed}. "
            "Exclude them by name, or patch without strict."
        )
    if dry_run:
        _dry_runs[model] = PatchReport(
            tuple(describe(f, f.plan and BlockState(f.plan, recipe, backend)) for f in found)
        )
        return model
    whole = WholeModel(type(model).__name__)
    install.install_all(
        [
            (f.module, f.plan and BlockState(f.plan, recipe, backend, on_trial=OnBlock(whole, place)))
            for place, f in enumerate(found)
        ]
    )
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    elif recipe == AUTO and is_nchw(found):
        warn_of_nchw(model)
    _dry_runs.pop(model, None)
    for f in found:
        (_excluded.add if f.code == "excluded" else _excluded.discard)(f.module)
    matched = sum(f.plan is not None for f in found)
    if left and not matched:
        warn_of_none(model, left)
    logger.info("patched %d of %d residual blocks of %s", matched, len(found), type(model).__name__)
    return model


@cache
def warn_without_kernels() -> None:
    """Warns, once in a process and in the name of patch's caller, that nothing will run fused for want of kernels."""
    warnings.warn(f"{library.without_kernels()} Until then a patched model runs as unpatched.", stacklevel=3)


def is_nchw(found: list[Found]) -> bool:
    """Whether fused calls of these blocks are known to be faster on this machine, but for their layout."""
    least = min((entry.least_channels for entries in TABLE.values() for entry in entries), default=None)
    if least is None:
        return False
    plans = [(f.module, f.plan) for f in found if f.plan is not None]
    weights: list[Any] = [m.get_submodule(unit.conv).weight for m, plan in plans for unit in plan.units]
    spatial = [w for w in weights if w.dim() == 4 and w.shape[1] > 1 and w.shape[2:] != (1, 1)]
    wide = any(len(w) >= least for w in spatial)
    return wide and all(w.is_cpu and w.is_contiguous() for w in spatial)


def warn_of_nchw(model: nn.Module) -> None:
    """Warns, in the name of patch's caller, of a model that no fused call will serve as it lies."""
    warnings.warn(
        f"fusedres.patch: the weights of {type(model).__name__} are NCHW, and fused calls are faster in channels_last: "
        "fusedres.patch(model, channels_last=True), or model.to(memory_format=torch.channels_last).",
        stacklevel=3,
    )


def warn_of_none(model: nn.Module, left: list[Found]) -> None:
    """Warns, in the name of patch's caller, that nothing was patched."""
    ((code, count),) = Counter((f.code or "").partition(":")[0] for f in left).most_common(1)
    warnings.warn(
        f"fusedres.patch: no residual block of {type(model).__name__} could be patched, {count} of {len(left)} "
        f"because {reason(code)} [{code}]; print(fusedres.report(model)) says why of each.",
        stacklevel=3,
    )


def patched_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if install.is_patched_block(m)]


def bind(model: nn.Module) -> None:
    """Blocks that were loaded from a pickle, each by itself, are of one model to their trials from now on."""
    whole = WholeModel(type(model).__name__)
    for place, (_, block) in enumerate(patched_blocks(model)):
        trials = vars(block)[install.STATE].on_trial
        if trials.whole.name is None:
            trials.whole, trials.place = whole, place


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
    for module in model.modules():
        _excluded.discard(module)
    _dry_runs.pop(model, None)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether any block of the model is patched.

    Raises:
        TypeError: not a module.
    """
    check_module(model, "is_patched")
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
    bind(model)
    return PatchReport(tuple(describe(found) for found in find(model)))
