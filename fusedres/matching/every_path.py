"""Whether a module takes one and the same path in every call that a plan speaks for: its runs, held against each other.

The dataflow is that of one size, in one state of torch, under the module's own class; without gradients there is none
to read. Here the module runs at other sizes, under autocast, without gradients, in inference mode and under a subclass.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch

from fusedres.matching import ambient, own_sizes
from fusedres.matching.dry_run import DryRunError, StandIn
from fusedres.matching.own_sizes import Shape
from fusedres.matching.trace import DEVICES, DTYPES, LAYOUTS, Trace, is_constant_norm, trace
from fusedres.modules import own_code

FIRST: Shape = (2, 32, 32)
OTHERS: tuple[
    tuple[Shape, ...], ...
] = (  # of each, the first that the module's convolutions and sums can take
    ((3, 9, 7), (3, 12, 8), (3, 48, 24)),
    ((40, 224, 160),),
)
AUTOCAST = ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16))  # for cpu and cuda, with OTHERS
WITHOUT_GRADIENTS: Shape = (1, 32, 32)
FAILS_AS_FUSED = {  # torch calls that fail at a size at which the fused block's guards leave the call to the original
    *("conv2d", "add", "add_", "__add__", "__iadd__", "__radd__", "max_pool2d", "max_pool2d_with_indices"),
    *("boolean_dispatch", "fn"),
}


class Paths(NamedTuple):
    """A module's runs. norms: its frozen norms, with their eps; called: submodules that a fused block calls too."""

    stand_in: StandIn
    channels: int
    norms: dict[str, float]
    called: set[str]

    def run(self, shape: Shape, training: bool, **context: Any) -> Trace:
        n, height, width = shape
        full = n, self.channels, height, width
        opaque = {*self.norms, *self.called}
        return trace(self.stand_in, full, training, opaque=opaque, called=self.called, **context)

    def same(self, found: Trace, first: Trace) -> bool:
        """Whether a run took the first one's path, through its frozen norms too."""
        return found.calls == first.calls and all(
            found.within[norm] == first.within[norm] for norm in self.norms
        )

    def same_or_constant(self, found: Trace, first: Trace) -> bool:
        """Also where frozen norms call torch's batch_norm instead, as some do without gradients."""
        return found.calls == first.calls and all(
            found.within[norm] == first.within[norm] or is_constant_norm(found, norm, eps)
            for norm, eps in self.norms.items()
        )


def check_every_path(stand_in: StandIn, channels: int, norms: dict[str, float], modules: set[str]) -> None:
    """Holds other sizes, states and classes against the first run, in training and in evaluation mode.

    norms: the block's frozen norms, with their eps: without gradients they may call torch's batch_norm instead;
    modules: submodules that the fused block calls too.

    Raises:
        DryRunError: the module does something else there.
    """
    check_code(stand_in)
    paths = Paths(stand_in, channels, norms, modules)
    for training in (True, False):
        first = paths.run(FIRST, training)
        check_state(first)
        for shapes, dtypes in zip(OTHERS, AUTOCAST, strict=False):
            check_other_call(paths, first, shapes, dtypes, training)
        if first.reads_sizes:
            for shape in own_sizes.probes(stand_in.modules.values(), channels):
                found = attempt(partial(paths.run, shape, training))
                if found is not None and not paths.same(found, first):
                    raise DryRunError("shape_dependent")
        check_kinds_of_tensors(paths, first, training)
        for context in ({"gradients": False}, {"gradients": False, "inference": True}):
            found = attempt(partial(paths.run, WITHOUT_GRADIENTS, training, **context), "grad_mode_dependent")
            if found is None or not paths.same_or_constant(found, first):
                raise DryRunError("grad_mode_dependent")


def check_code(stand_in: StandIn) -> None:
    """Raises DryRunError where the module's own code asks for what no run here changes."""
    cls: Any = type(stand_in.root)
    if own_code.skips_own_class(cls):
        raise DryRunError("asks_own_class")
    modules = [m for m in stand_in.modules.values() if not own_code.is_torch(type(m))]
    functions = own_code.functions_of(own_code.user_classes(modules), own_sizes.held(modules))
    asked = ambient.question(functions)
    if asked is not None:
        raise DryRunError(f"asks_state:{asked}")


def check_other_call(
    paths: Paths,
    first: Trace,
    shapes: Iterable[Shape],
    dtypes: tuple[torch.dtype, torch.dtype],
    training: bool,
) -> None:
    """One run at another size, under autocast and a subclass at once; the reason is looked for where it differs."""
    for shape in shapes:
        found = attempt(
            partial(paths.run, shape, training, within=ambient.autocast(*dtypes), subclassed=True)
        )
        if found is not None:
            break
    else:
        raise DryRunError("shape_dependent")
    if paths.stand_in.asked_class:
        raise DryRunError("asks_own_class")
    if paths.same(found, first):
        return
    if not paths.same(paths.run(shape, training), first):
        raise DryRunError("shape_dependent")
    under_subclass = paths.run(FIRST, training, subclassed=True)
    raise DryRunError("asks_state" if paths.same(under_subclass, first) else "asks_own_class")


def check_kinds_of_tensors(paths: Paths, first: Trace, training: bool) -> None:
    """Runs in float32, and in other dtypes and layouts where the module's own code asks for them.

    No run answers for another device than meta.
    """
    if not first.reads.isdisjoint(DEVICES):
        raise DryRunError("asks_device")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = attempt(partial(paths.run, FIRST, training, dtype=dtype))
        if found is None or not paths.same(found, first):
            raise DryRunError("dtype_dependent")
        if first.reads.isdisjoint(DTYPES):
            break
    if not first.reads.isdisjoint(LAYOUTS):
        for layout in (torch.channels_last, None):
            found = attempt(partial(paths.run, FIRST, training, layout=layout))
            if found is None or not paths.same(found, first):
                raise DryRunError("layout_dependent")


def check_state(found: Trace) -> None:
    if found.enters_state:
        raise DryRunError("enters_state")


def attempt(run: partial[Trace], code: str = "checks_input") -> Trace | None:
    """The run, or None where torch's own checks of sizes failed as they do in the fused block's guards.

    Raises:
        DryRunError: the module's own code raised (`code`), or did what no forward of a block may do.
    """
    try:
        found = run()
        check_state(found)
        return found
    except DryRunError as error:
        if not error.code.startswith("dry_run_failed"):
            raise
        if isinstance(error.__cause__, RecursionError):
            raise DryRunError("asks_own_class") from error
        if error.failed_in in FAILS_AS_FUSED or error.failed_in in run.func.__self__.called:  # type: ignore[attr-defined]
            return None
        raise DryRunError(f"{code}:{type(error.__cause__).__name__}") from error
