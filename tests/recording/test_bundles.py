"""What a replay keeps for the next pass: when, as whose inputs, and how long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedres.ops.native import library
from fusedres.recording import replays
from fusedres.recording.bundle import Bundle

pytestmark = pytest.mark.skipif(not library.is_loaded(), reason="the compiled kernels are not built")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(replays, "DEVICES", {"cpu"})
    replays.forget()
    yield
    replays.forget()


def sums(*tensors: Tensor) -> tuple[tuple[Tensor, ...], None]:
    first, second = tensors
    return (first * second, torch.relu(first), second.neg()), None


def test_results_that_are_kept_are_inputs_of_the_next_pass() -> None:
    """As if they had come out and gone in again."""
    with torch.no_grad():
        for i in range(6):
            x, y = torch.full((3,), float(i)), torch.tensor([1.0, -2.0, 3.0])
            made, _ = replays.run("first", (x, None, y), lambda x=x, y=y: sums(x, y), keeps=True)  # type: ignore[misc]
            assert torch.equal(made[0], x * y)
            if i < 2:
                assert len(made) == 3
                kept, bundle = made[1:], None
                given = x, *kept
            else:
                bundle = made[1]
                assert isinstance(bundle, Bundle) and bundle.given == (True, True)
                kept, given = None, (x,)

            def compute(
                x: Tensor = x, kept: Any = kept, bundle: Any = bundle
            ) -> tuple[tuple[Tensor, ...], None]:
                a, b = kept or bundle.tensors()
                return (x * a, b, a * b), None

            for key in (
                ("second", "third") if bundle else ("second",)
            ):  # recorded without a bundle, and of one
                out, _ = replays.run(key, given, compute, bundle=bundle)
                for found, expected in zip(out, (x * x, -y, x * -y), strict=True):
                    assert torch.equal(found, expected)
    assert [len(p.recordings) for p in replays.known().values()] == [1, 1, 1]


@pytest.mark.parametrize("kept", ["an output", "an input"])
def test_what_is_somebody_elses_is_not_kept(kept: str) -> None:
    """An output would keep the graph alive that keeps the bundle."""
    x = torch.ones(3)
    with torch.no_grad():
        for _ in range(5):
            y = torch.relu(x)

            def compute() -> tuple[tuple[Tensor, Tensor], None]:
                y = torch.relu(x)
                return (y, y if kept == "an output" else x), None

            (first, second), _ = replays.run("key", (x,), compute, keeps=True)
            assert torch.equal(first, y)
            assert second is first if kept == "an output" else second is x


def test_a_bundle_is_given_back_with_the_last_that_holds_it() -> None:
    x, y = torch.ones(3), torch.ones(3)
    with torch.no_grad():
        for _ in range(4):
            made, _ = replays.run("key", (x, y), lambda: sums(x, y), keeps=True)
    bundle = made[1]
    number = bundle.number
    assert [torch.equal(a, b) for a, b in zip(bundle.tensors(), sums(x, y)[0][1:], strict=True)] == [
        True,
        True,
    ]
    del made, bundle
    with pytest.raises(RuntimeError, match=f"there is no bundle {number}"):
        torch.ops.fusedres_native.bundle_tensors(number)
