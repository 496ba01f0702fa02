"""When a pass is recorded, when it is replayed, and what happens where a replay fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres.ops import set_aside
from fusedres.ops.contract import BnStats
from fusedres.ops.native import from_python, library
from fusedres.recording import replays

pytestmark = pytest.mark.skipif(not library.is_loaded(), reason="the compiled kernels are not built")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(replays, "DEVICES", {"cpu"})
    replays.forget()
    yield
    replays.forget()


class Computed:
    """y = relu(x) and a note; counts how often Python ran."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, *tensors: Tensor | None, key: str = "key") -> tuple[Tensor, Any]:
        def compute() -> tuple[tuple[Tensor], str]:
            self.times += 1
            x = tensors[0]
            assert x is not None
            return (torch.relu(x),), "note"

        with torch.no_grad():
            (y,), note = replays.run(key, tensors, compute)
        assert y is not None
        return y, note


def the_pass() -> replays.Pass:
    (found,) = replays.known().values()
    return found


def test_python_runs_a_pass_twice_and_the_library_from_then_on() -> None:
    computed = Computed()
    for i in range(5):
        x = torch.full((3,), float(i))
        y, note = computed(x)
        assert torch.equal(y, x)
        assert note == "note"
    assert computed.times == 2
    assert len(the_pass().recordings) == 1


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(4),
        torch.ones(3, dtype=torch.float64),
        torch.ones(6)[::2],
        torch.ones(4)[1:],  # 4 bytes from the last multiple of 16
    ],
    ids=["sizes", "dtype", "strides", "alignment"],
)
def test_tensors_of_another_form_are_another_recording(other: Tensor) -> None:
    computed = Computed()
    for _ in range(3):
        computed(torch.ones(3))
    y, _ = computed(other)
    assert torch.equal(y, other)
    assert y.dtype == other.dtype
    assert (computed.times, len(the_pass().recordings)) == (3, 2)


def test_after_so_many_forms_python_stays() -> None:
    computed = Computed()
    for size in range(1, 20):
        computed(torch.ones(size))
    assert len(the_pass().recordings) == replays.FORMS
    assert computed.times == 19


def test_absent_tensors_are_part_of_the_form() -> None:
    """One that is given in the place of another must not be taken for it."""
    computed = Computed()
    for _ in range(3):
        computed(torch.ones(3), torch.ones(3), None)
    computed(torch.ones(3), None, torch.ones(3))
    assert len(replays.known()) == 2
    assert computed.times == 3


def test_what_was_set_aside_since_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = Computed()
    for _ in range(3):
        computed(torch.ones(3))
    place = set_aside.Place("native", BnStats, torch.device("cpu"))
    monkeypatch.setitem(set_aside._found, place, "for a test")
    computed(torch.ones(3))
    assert computed.times == 3


def test_the_passes_of_a_process_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "PASSES", 3)
    computed = Computed()
    for i in range(5):
        computed(torch.ones(3), key=str(i))
    assert len(replays.known()) == 3


def test_nothing_is_recorded_under_somebodys_dispatch_mode() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    assert replays.are_on(torch.ones(1))
    with Mode():
        assert not replays.are_on(torch.ones(1))
    assert not replays.are_on(torch.ones(1, device="meta"))


def test_subclasses_are_left_to_python() -> None:
    class Sub(Tensor):
        pass

    computed = Computed()
    for _ in range(4):
        computed(torch.ones(3).as_subclass(Sub))
    assert computed.times == 4


def test_what_cannot_be_recorded_is_computed_and_the_reason_is_kept() -> None:
    x = torch.ones(3)
    for _ in range(4):
        (y,), _ = replays.run("key", (x,), lambda: ((torch.relu(x)[: int(x.sum())],), None))
        assert y is not None
        assert torch.equal(y, x)
    assert the_pass().problem == "aten._local_scalar_dense.default: a result that is a float"


def test_the_form_that_comes_most_often_is_asked_first() -> None:
    computed = Computed()
    for x in [torch.ones(3), torch.ones(3), torch.ones(2, 2), torch.ones(2, 2)] + [torch.ones(2, 2)] * 3:
        computed(x)
    first, second = the_pass().recordings
    assert (first.times, second.times) == (4, 0)
    computed(torch.ones(3))
    assert the_pass().recordings == [first, second] and second.times == 1


class Failing:
    """A native replay that fails at a step."""

    def __init__(self, message: str, step: int) -> None:
        self.message, self.step = message, step

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(*_: object) -> None:
            raise RuntimeError(self.message)

        monkeypatch.setattr(replays.Recording, "run", run)
        monkeypatch.setattr(replays, "failed_step", lambda: self.step)


def test_what_fails_before_the_first_step_has_written_nothing() -> None:
    """Whatever step an earlier replay came to."""
    computed = Computed()
    for _ in range(4):
        computed(torch.ones(3))
    assert replays.failed_step() > 0
    with pytest.raises(RuntimeError, match="no recording -1"):
        torch.ops.fusedres_native.replay.default(-1, [torch.ones(3)])
    assert replays.failed_step() == 0


def test_a_replay_casts_nothing_that_python_does_not_cast() -> None:
    x = torch.randn(4, 4)

    def compute() -> tuple[tuple[Tensor], None]:
        with torch.autocast("cpu", enabled=False):
            return (torch.mm(x, x),), None

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            (y,), _ = replays.run("key", (x,), compute)
            assert y is not None and torch.equal(y, compute()[0][0])
    assert the_pass().recordings


def test_where_a_replay_fails_python_computes_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = Computed()
    for _ in range(3):
        computed(torch.ones(3))
    Failing("unknown operator", 0).install(monkeypatch)
    for _ in range(2):
        y, _ = computed(torch.ones(3))
        assert torch.equal(y, torch.ones(3))
    assert (computed.times, the_pass().problem) == (4, "unknown operator")


def test_a_replay_without_memory_is_computed_by_python_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed = Computed()
    for _ in range(3):
        computed(torch.ones(3))
    with monkeypatch.context() as patched:
        Failing("CUDA out of memory. Tried to allocate", 0).install(patched)
        computed(torch.ones(3))
    computed(torch.ones(3))
    assert computed.times == 3


@pytest.mark.parametrize(
    ("message", "kind"),
    [("CUDA out of memory. Tried", torch.OutOfMemoryError), ("CUDA error: 700", RuntimeError)],
)
def test_after_an_input_was_written_into_the_error_is_raised(
    monkeypatch: pytest.MonkeyPatch, message: str, kind: type[Exception]
) -> None:
    x = torch.ones(3)

    def compute() -> tuple[tuple[Tensor], None]:
        y = x.clone()
        x.copy_(y)
        return (y,), None

    with torch.no_grad():
        for _ in range(3):
            replays.run("key", (x,), compute)
        Failing(message, 5).install(monkeypatch)
        with pytest.raises(kind, match=message[:12]):
            replays.run("key", (x,), compute)


def test_autograd_is_told_of_what_a_replay_writes_into() -> None:
    """As it was told when Python ran."""
    x = torch.ones(3)

    def compute() -> tuple[tuple[Tensor], None]:
        y = x.clone()
        x.copy_(y)
        return (y,), None

    seen = []
    with torch.no_grad():
        for _ in range(4):
            before = x._version
            replays.run("key", (x,), compute)
            seen.append(x._version - before)
    assert seen[2:] == seen[:2] == [1, 1]


def test_a_recording_is_dropped_with_its_pass() -> None:
    computed = Computed()
    for _ in range(3):
        computed(torch.ones(3))
    number = the_pass().recordings[0].number
    replays.forget()
    with pytest.raises(RuntimeError, match=f"there is no recording {number}"):
        torch.ops.fusedres_native.replay(number, [torch.ones(3)])


def test_a_replay_by_python_is_the_operators() -> None:
    """The same results, errors of the same kind, and other threads run meanwhile."""
    x = torch.arange(4.0)
    computed = Computed()
    for _ in range(3):
        computed(x)
    (recording,) = the_pass().recordings
    by_operator, by_python = torch.ops.fusedres_native.replay.default, from_python.replay()
    assert by_python is not None
    for keeps in (False, True):
        (expected, _), (found, _) = (r(recording.number, [x], 0, keeps) for r in (by_operator, by_python))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and found
    assert by_python(recording.number, [torch.ones(5)], 0, False) == ([], 0)
    with pytest.raises(RuntimeError, match="no recording 12345"):
        by_python(12345, [x], 0, False)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        by_python(recording.number, [None], 0, False)  # type: ignore[list-item]
    assert torch.equal(x, torch.arange(4.0))


def test_a_recording_that_was_forgotten_runs_no_more() -> None:
    computed = Computed()
    x = torch.ones(3)
    for _ in range(3):
        computed(x)
    found = the_pass()
    (recording,) = found.recordings
    assert replays.again(found, recording, x, recording.run, [x]) is not None
    replays.forget()
    assert replays.again(found, recording, x, recording.run, [x]) is None


def test_a_kernel_that_somebody_put_before_torchs_is_not_passed_by() -> None:
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 1, 1)
    arguments = None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1

    def steps() -> list[Tensor]:
        outputs = []
        for _ in range(3):
            (y,), _ = replays.run(
                "convolution",
                (x, weight),
                lambda: ((torch.ops.aten.convolution(x, weight, *arguments),), None),
            )
            outputs.append(y)
        return outputs

    first = steps()
    assert torch.equal(first[0], first[2])
    implementation = torch.library.Library("aten", "IMPL")
    implementation.impl("convolution", lambda x, *_: torch.full_like(x, 7), "CPU")
    try:
        replays.forget()
        assert all(bool((y == 7).all()) for y in steps())
    finally:
        implementation._destroy()
