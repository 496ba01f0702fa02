"""A whole model with its winners and without, with times that are told."""

from itertools import cycle

import pytest

from fusedres.trials import comparison as comparisons
from fusedres.trials.comparison import Comparison


def settle(comparison, seconds_of, shapes=("a",), most=200):
    ran = []
    for i in range(most):
        step = comparison.begin(shapes[i % len(shapes)])
        if step is None:
            return ran
        ran.append(step.fused)
        comparison.tell(step, seconds_of(step.fused))
    raise AssertionError("not settled")


def test_a_gain_is_kept_after_three_pairs():
    comparison = Comparison()
    ran = settle(comparison, {True: 1.0, False: 1.2}.__getitem__)
    assert comparison.kept and comparison.ratio.median == pytest.approx(1.2)
    assert ran == [True, False, False, True, True, False]


def test_a_loss_turns_back_and_needs_five_pairs():
    comparison = Comparison()
    ran = settle(comparison, {True: 1.1, False: 1.0}.__getitem__)
    assert comparison.kept is False and len(ran) == 10


def test_what_is_undecided_ends_by_the_median():
    for gain, kept in ((1.1, True), (0.9, False)):
        comparison, noise = Comparison(), cycle((2.0, 1.0, 0.5))
        ran = settle(comparison, lambda fused, gain=gain, noise=noise: 1 if fused else gain * next(noise))
        assert comparison.kept is kept and len(ran) == 24


def test_steps_are_paired_with_those_of_their_shape():
    comparison, of_shape = Comparison(), {"a": 1.0, "b": 100.0}
    for i in range(40):
        shape = "ab"[i % 2]
        step = comparison.begin(shape)
        if step is None:
            break
        comparison.tell(step, of_shape[shape] * (1.0 if step.fused else 1.3))
    assert comparison.kept and comparison.ratio.high == pytest.approx(1.3)


def test_steps_without_times_leave_the_winners():
    comparison = Comparison()
    for _ in range(comparisons.MOST_WAITING):
        assert comparison.begin("a") is not None
    assert comparison.begin("a") is None and comparison.kept and comparison.ratio is None


def test_progress():
    comparison = Comparison()
    assert comparison.progress == "0/3"
    for _ in range(2):
        step = comparison.begin("a")
        comparison.tell(step, 1.0)
    assert comparison.progress == "1/3"
