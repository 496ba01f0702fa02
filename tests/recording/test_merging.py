"""Two calls of the library's ops of which a replay makes one, and those of which it does not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_recorder import NATIVE, Function, assert_replayed, inputs, own_ops, recorded
from torch import Tensor

from fusedres.ops.native import library
from fusedres.recording.code import Opcode

pytestmark = pytest.mark.skipif(not library.is_loaded(), reason="the compiled kernels are not built")


def own_ops_of_a_join(x: Tensor, weight: Tensor) -> Sequence[Tensor | None]:
    """The backward of a block with a projection, and of one without."""
    other = torch.relu(x)
    mean, var = NATIVE.bn_stats(x)
    invstd, scale, shift = NATIVE.bn_scale_shift(mean, var, None, None, 1e-5)
    moments = NATIVE.bn_stats(other)
    vectors = NATIVE.bn_scale_shift(*moments, scale, shift, 1e-3)
    sums = NATIVE.bn_add_relu_backward_reduce(x, x, mean, scale, shift, None, True, other, moments[0])
    main = NATIVE.bn_backward_coefficients(sums[0], sums[1], mean, invstd, scale, 32, True)
    shortcut = NATIVE.bn_backward_coefficients(sums[0], sums[2], moments[0], *vectors[:2], 32, False)
    plain = NATIVE.bn_add_relu_backward_reduce(x, x, mean, scale, shift, None, False, None, None)
    frozen = NATIVE.bn_backward_coefficients(plain[0], plain[1], mean, invstd, scale, 32, False)
    return *vectors, *sums, *main, *shortcut, *plain, *frozen


def own_ops_that_stay_two(x: Tensor, weight: Tensor) -> Sequence[Tensor | None]:
    """The second one is not of what the first one sums."""
    other = torch.relu(x)
    mean, var = NATIVE.bn_stats(x)
    moments = NATIVE.bn_stats(other)
    vectors = NATIVE.bn_scale_shift(mean, var, None, None, 1e-5)
    reversed_ = NATIVE.bn_scale_shift(moments[1].clone(), moments[0].abs(), None, None, 1e-5)
    invstd, scale, shift = vectors
    sums = NATIVE.bn_add_relu_backward_reduce(x, x, mean, scale, shift, None, True, None, None)
    swapped = NATIVE.bn_backward_coefficients(sums[1], sums[0], mean, invstd, scale, 32, True)
    NATIVE.bn_add_relu_backward_reduce(x, x, mean, scale, shift, None, True, None, None)
    of_another = NATIVE.bn_backward_coefficients(sums[0], sums[1], moments[0], invstd, scale, 32, True)
    return *vectors, *reversed_, *swapped, *of_another


@pytest.mark.parametrize("function", [own_ops, own_ops_of_a_join, own_ops_that_stay_two])
def test_a_replay_gives_what_the_function_gives(function: Function) -> None:
    assert_replayed(function)


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (own_ops, ["bn_stats_scale_shift", "bn_add_relu_forward", "bn_add_relu_forward"]),
        (
            own_ops_of_a_join,
            [*["bn_stats_scale_shift"] * 2, *["bn_add_relu_backward_reduce_coefficients"] * 2],
        ),
        (
            own_ops_that_stay_two,
            [
                *("bn_stats", "bn_stats", "bn_scale_shift", "bn_scale_shift"),
                *("bn_add_relu_backward_reduce", "bn_backward_coefficients") * 2,
            ],
        ),
    ],
)
def test_an_op_that_sums_and_the_one_of_its_sums_are_one_call(function: Function, calls: list[str]) -> None:
    recorder, _ = recorded(function, inputs())
    names = list(recorder.operators)
    called = [names[step.words[0]] for step in recorder.steps if step.opcode is Opcode.CALL]
    assert [name.removeprefix("fusedres_native::") for name in called if "fusedres" in name] == calls
