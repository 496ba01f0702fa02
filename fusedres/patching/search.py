"""Looks through a model for residual blocks and stems, and for those that `include` and `exclude` name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from fusedres.matching import grammar, stems
from fusedres.matching.owners import NoMatch
from fusedres.matching.plan import Plan
from fusedres.modules import own_code
from fusedres.modules.derived_class import STATE, base_class, derive, set_class
from fusedres.patching.state import is_patched_block, original_view

Patterns = str | Iterable[str] | None
LISTED = 8  # names of blocks in an error
STEM = "stem"  # the name under which a model's own stem is reported


class Found(NamedTuple):
    """A module that looks like a residual block, or a stem: its plan, or why it has none."""

    name: str
    module: nn.Module
    plan: Plan | None
    code: str | None
    is_stem: bool = False


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
    known: Plan | None = vars(module)[STATE].plan if is_patched_block(module) else None
    if known is not None and known.whole and not renew:
        return known
    plan: Plan
    if grammar.looks_residual(module):
        plan = grammar.plan(original_view(module))
    elif stems.looks_like_stem(module):
        plan = stems.plan_stem_module(original_view(module))
    else:
        return None
    units = [module.get_submodule(path) for unit in plan.units for path in (unit.conv, unit.bn)]
    if any(id(unit) in shared for unit in units):
        raise NoMatch("shared_module")
    check_class(module, plan)
    return plan


def check_class(module: nn.Module, plan: Plan) -> None:
    """Raises NoMatch where the module cannot be given a patched class."""
    view = original_view(module)
    try:
        set_class(object.__new__(type(view)), derive(type(view), {}))
    except TypeError as error:
        raise NoMatch(f"class_resists:{error}") from error


def plan_again(module: nn.Module, method: str) -> Plan | str:
    """The plan of a module whose `method` was patched before it was pickled, or the code of why there is none now."""
    view = original_view(module)
    with _disable_current_modes():
        try:
            if stems.has_stem(type(view)) and method != "forward":
                return stems.plan_stem(view, type(view))
            return find_plan(view, set(), True) or "not_residual"
        except NoMatch as refusal:
            return refusal.code


def find_stem(name: str, model: nn.Module) -> Found:
    if is_patched_block(model):
        return Found(name, model, vars(model)[STATE].plan, None, True)
    try:
        plan = stems.plan_stem(model, base_class(model))
        check_class(model, plan)
        return Found(name, model, plan, None, True)
    except NoMatch as refusal:
        return Found(name, model, None, refusal.code, True)


def find(model: nn.Module, renew: bool = False) -> list[Found]:
    """The residual blocks of the model, outermost first, and the innermost modules that only look like one.

    renew: look at patched blocks again, for what changed in them since.
    """
    shared, seen = shared_modules(model), set()

    def visit(name: str, module: nn.Module, asked: frozenset[type]) -> Iterator[Found]:
        """asked: classes that the code of the modules around it asks for with `is`."""
        if id(module) in seen:
            return
        seen.add(id(module))
        code, is_stem = None, not grammar.looks_residual(module)
        if stems.has_stem(base_class(module)):
            yield find_stem(f"{name}.{STEM}" if name else STEM, module)
        try:
            if (plan := find_plan(module, shared, renew)) is not None:
                if base_class(module) in asked:
                    raise NoMatch("asks_own_class")
                yield Found(name, module, plan, None, is_stem)
                return
        except NoMatch as refusal:
            is_meant = grammar.was_meant_as_one(module, refusal.code) or (
                is_stem and stems.was_meant_as_one(module, refusal.code)
            )
            code = refusal.code if is_meant else None
        asked |= own_code.types_asked_for(base_class(module))
        below = [
            found
            for child_name, child in module.named_children()
            for found in visit(f"{name}.{child_name}" if name else child_name, child, asked)
        ]
        if code not in (None, "not_residual") and not below:
            yield Found(name, module, None, code, is_stem)
        yield from below

    with _disable_current_modes():  # dry runs are on meta tensors, inside FakeTensorMode too
        return list(visit("", model, frozenset()))


def read_patterns(option: str, patterns: object) -> tuple[str, ...] | None:
    """The patterns of include or exclude; None where none were given.

    Raises:
        TypeError: neither a string nor strings.
    """
    if patterns is None:
        return None
    if isinstance(patterns, str):
        return (patterns,)
    given = tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    if all(isinstance(pattern, str) for pattern in given):
        return given
    raise TypeError(
        f"fusedres.patch: {option} needs a pattern or a list of patterns, found {patterns!r}; "
        'pass names of blocks, as "layer1.*"'
    )


def selects(patterns: tuple[str, ...] | None, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns or ())


def check_included(include: tuple[str, ...] | None, found: list[Found]) -> None:
    """Raises ValueError if include was given and names none of the blocks."""
    names = [f.name for f in found]
    if include is None or not names or any(selects(include, name) for name in names):
        return
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    raise ValueError(
        f"fusedres.patch: include={list(include)} matches no block; the blocks found are "
        f"{', '.join(map(repr, names[:LISTED]))}{more}."
    )


def choose(found: list[Found], include: Patterns, exclude: Patterns) -> list[Found]:
    """The blocks found, without the plans of those that include or exclude leave out.

    Raises:
        TypeError, ValueError: as `read_patterns` and `check_included`.
    """
    only, without = read_patterns("include", include), read_patterns("exclude", exclude)
    check_included(only, found)
    return [
        f
        if (only is None or selects(only, f.name)) and not selects(without, f.name)
        else f._replace(plan=None, code="excluded")
        for f in found
    ]
