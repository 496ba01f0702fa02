"""Runs a pass by its recording: the first time as Python says, then recorded, then natively.

A recording is of tensors of one form: sizes, strides, dtypes, devices, alignment. Those of one pass that differ are
few; where they are many, as with images of ever other sizes, Python stays.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from itertools import compress, repeat
from operator import is_not, or_
from typing import Any, TypeVar

import torch
from torch import Tensor

from fusedres.ops import set_aside
from fusedres.ops.native import library
from fusedres.ops.triton import HERE, launches_to, on_device_of
from fusedres.recording.bundle import Bundle
from fusedres.recording.code import UnrecordableError
from fusedres.recording.recorder import Recorder, convolutions_are_torchs
from fusedres.recording.recording import Recording

logger = logging.getLogger("fusedres")
ENVIRONMENT_VARIABLE = "FUSEDRES_REPLAY"  # read once: "0" leaves every pass to Python
IS_ASKED_FOR = os.environ.get(ENVIRONMENT_VARIABLE) != "0"
DEVICES = {"cuda"}  # where the host's time is what a pass waits for
FORMS = 4  # of one pass
PASSES = 256  # in a process
OUT_OF_MEMORY = "out of memory"
PLAIN = {Tensor, torch.nn.Parameter}
# of autograd and of autocast, which a replay goes past: it was recorded below them
ABOVE = reduce(
    or_,
    [
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
        for name in (
            "AutogradFunctionality",
            "AutogradOther",
            "AutogradNestedTensor",
            "AutocastCPU",
            "AutocastCUDA",
        )
    ],
)

T = TypeVar("T")
Tensors = Sequence[Tensor | None]
# what was computed, and what a later replay is to hand out with it; behind the first tensor there may be a bundle
Result = tuple[Sequence[Any], Any]


class Pass:
    """What is known of one pass; `problem`: why it stays with Python."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.was_seen = False
        self.problem: str | None = None
        self.latest: Recording | None = None  # that served

    def served_by(self, recording: Recording) -> None:
        """What serves most often is asked first: forms of the first steps may never come again."""
        recording.times += 1
        self.latest = recording
        if len(self.recordings) < 2:
            return
        place = self.recordings.index(recording) if recording in self.recordings else 0
        if place and recording.times > self.recordings[place - 1].times:
            self.recordings[place - 1 : place + 1] = recording, self.recordings[place - 1]

    def forget(self) -> None:
        """It is recorded anew, also by whoever holds it."""
        self.recordings, self.latest = [], None

    def leave(self, problem: str) -> None:
        """Nothing more of it is recorded: Python runs it."""
        self.problem = problem
        logger.debug("a pass is run by Python: %s", problem)


_passes: OrderedDict[Hashable, Pass] = OrderedDict()


_off: ContextVar[bool] = ContextVar("fusedres_replays_off", default=False)


@contextmanager
def off() -> Iterator[None]:
    """Within the context, in this thread, Python runs every pass, and nothing is recorded."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def are_on(x: Tensor) -> bool:
    """Whether passes over tensors like x are to be recorded."""
    return are_on_for(x.device.type)


def are_on_for(device: str) -> bool:
    """The same of a kind of device."""
    if device not in DEVICES or not IS_ASKED_FOR or torch._C._len_torch_dispatch_stack():
        return False
    return library.is_loaded() and not _off.get()


def forget() -> None:
    """Every pass is recorded anew."""
    for found in _passes.values():
        found.forget()
    _passes.clear()


def known() -> dict[Hashable, Pass]:
    """The passes so far, for reports and tests."""
    return dict(_passes)


def pass_of(key: Hashable) -> Pass:
    found = _passes.get(key)
    if found is None:
        found = _passes[key] = Pass()
        if len(_passes) > PASSES:
            _, oldest = _passes.popitem(last=False)
            oldest.forget()
    return found


def whole_key(key: Hashable, given: tuple[bool, ...]) -> Hashable:
    """key: as of `run`; given: which of the tensors there are."""
    return key, given, generation()


def generation() -> tuple[int, bool]:
    """Another one as soon as passes are to be recorded anew: something was set aside, or a convolution is another."""
    return set_aside.generation(), convolutions_are_torchs()


def is_for_kernels(t: Tensor) -> bool:
    """Whether t is memory and nothing else: the dispatcher would take no wrapper away, nor make a sign true first."""
    try:
        return t.data_ptr() != 0 and not t.is_neg()
    except RuntimeError:  # what torch.func left of a tensor has no storage
        return False


def look_up(key: Hashable, tensors: Tensors, bundle: Bundle | None = None) -> Pass | None:
    """The pass that `run` knows by that, if any."""
    given = tuple(map(is_not, tensors, repeat(None)))
    return _passes.get(whole_key(key, given if bundle is None else given + bundle.given))


def again(found: Pass, recording: Recording, x: Tensor, run: Callable[..., T | None], *args: Any) -> T | None:
    """What a recording gives that has served such inputs; None where they are others, and it is to be seen why.

    Args:
        x: one of the inputs; run: a method of the recording, which takes `args`.
    """
    if recording not in found.recordings:
        return None
    elsewhere = on_device_of(x)
    try:
        with torch._C._ExcludeDispatchKeyGuard(ABOVE):
            if elsewhere is HERE:
                out = run(*args)
            else:
                with elsewhere:
                    out = run(*args)
    except RuntimeError as error:
        refused(error, recording, found)
        return None
    if out is not None:
        found.served_by(recording)
    return out


def run(
    key: Hashable,
    tensors: Tensors,
    compute: Callable[[], Result],
    bundle: Bundle | None = None,
    keeps: bool = False,
) -> Result:
    """What `compute()` gives, by a recording of it where there is one.

    Args:
        key: everything that `compute` depends on, but for the tensors' forms and their values.
        tensors: all that `compute` takes, x first.
        compute: makes tensors, and writes into none of `tensors` but through torch's operators.
        bundle: of more tensors that `compute` takes, as if they came behind the others.
        keeps: where a recording serves, the results behind the first are to come as one Bundle.
    """
    given = tuple(map(is_not, tensors, repeat(None)))
    found = pass_of(whole_key(key, given if bundle is None else given + bundle.given))
    inputs: list[Any] = list(compress(tensors, given))
    if not PLAIN.issuperset(map(type, inputs)):
        return compute()
    for recording in tuple(found.recordings):
        try:
            with on_device_of(inputs[0]), torch._C._ExcludeDispatchKeyGuard(ABOVE):
                out = recording.run(inputs, bundle, keeps)
        except RuntimeError as error:
            return failed(error, recording, found, compute)
        if out is not None:
            found.served_by(recording)
            return out, recording.note
    if found.problem is not None or not found.was_seen or len(found.recordings) >= FORMS:
        found.was_seen = True
        return compute()
    if bundle is not None:
        inputs += [t for t in bundle.tensors() if t is not None]
    return recorded(found, inputs, compute)


def versions(tensors: list[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


def failed_step() -> int:
    """Where this thread's last replay failed."""
    return int(torch.ops.fusedres_native.replay_failed_step())


def refused(error: RuntimeError, recording: Recording, found: Pass) -> None:
    """Leaves the pass to Python, unless memory was all that it lacked. Where something that was given has been written
    into it is too late for Python, and the error is raised, of its kind: the native library tells no kinds apart."""
    is_memory = OUT_OF_MEMORY in str(error)
    if failed_step() >= recording.first_mutation:
        raise torch.OutOfMemoryError(str(error)) if is_memory else error
    if not is_memory:
        found.forget()
        found.leave(str(error))


def failed(error: RuntimeError, recording: Recording, found: Pass, compute: Callable[[], Result]) -> Result:
    """What `compute()` gives, or raises: Python tells kinds of errors apart."""
    refused(error, recording, found)
    return compute()


def recorded(found: Pass, inputs: list[Tensor], compute: Callable[[], Result]) -> Result:
    """What `compute()` gives, which is written down as it runs."""
    try:
        recorder = Recorder(inputs, flags_are_constant=inputs[0].is_cuda)
    except UnrecordableError as error:
        found.leave(str(error))
        return compute()
    before = versions(inputs)
    with launches_to(recorder.launched), recorder:
        out = compute()
    moved = [new - old for old, new in zip(before, versions(inputs), strict=True)]
    versioned = [i for i, times in enumerate(moved) if times > recorder.told.get(i, 0)]
    try:
        words, operators, slots, first = recorder.finished(out[0])
    except UnrecordableError as error:
        found.leave(str(error))
        return out
    number = torch.ops.fusedres_native.recording_add(words, operators)
    recording = Recording(number, slots, len(inputs), versioned, first)
    recording.note, recording.kernels = out[1], recorder.kernels
    found.recordings.append(recording)
    return out
