"""What a recorder writes down, run natively, is what was computed; what it cannot write down it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.ops.native import library
from fusedres.recording import code
from fusedres.recording.code import Opcode, UnrecordableError
from fusedres.recording.recorder import Recorder

pytestmark = pytest.mark.skipif(not library.is_loaded(), reason="the compiled kernels are not built")
aten = torch.ops.aten
NATIVE = torch.ops.fusedres_native
Function = Callable[[Tensor, Tensor], Sequence[Tensor | None]]


def inputs(seed: int = 0) -> list[Tensor]:
    """x [2, 8, 4, 4] in channels_last and a weight [8, 8, 3, 3]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 8, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last)
    return [x, torch.randn(8, 8, 3, 3, generator=generator)]


def casts(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return x.to(torch.bfloat16), weight.to(torch.bfloat16).to(torch.float32)


def copies(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return x.clone(), x.contiguous(), torch.empty_like(weight).copy_(weight)


def views(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    rows = x.permute(0, 2, 3, 1).reshape(-1, 8)
    return rows[3:], rows.t(), weight[:, :, 1, 1], weight.select(0, 2)[1:, 1:].clone()


def zeros(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return torch.zeros_like(x), x.new_zeros(3), torch.zeros(2, 3)


def products(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return (torch.mm(x.permute(0, 2, 3, 1).reshape(-1, 8), weight[:, :, 0, 0].t()),)


def sums(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return x.clone().add_(x), x.sum((0, 2, 3))


def convolutions(x: Tensor, weight: Tensor) -> Sequence[Tensor | None]:
    y = F.conv2d(x, weight, None, 1, 1)
    args = None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    return y, *aten.convolution_backward(y, x, weight, *args, [False, True, False])


def own_ops(x: Tensor, weight: Tensor) -> Sequence[Tensor | None]:
    """Results of which some are optional, absent or there."""
    mean, var = NATIVE.bn_stats(x)
    vectors = NATIVE.bn_scale_shift(mean, var, None, None, 1e-5)
    _, scale, shift = vectors
    plain = NATIVE.bn_add_relu_forward(x, scale, shift, None, None, None, True, False)
    masked = NATIVE.bn_add_relu_forward(x, scale, shift, x, None, None, True, True)
    return mean, var, *vectors, *plain, *masked


def lists(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    moved = torch.zeros(8), torch.zeros(8)
    mean, var = NATIVE.bn_stats(x)
    NATIVE.bn_running_stats_([moved[0]], [moved[1]], [], [mean], [var], [0.9], [0.1], [0.2])
    return moved


def an_input(x: Tensor, weight: Tensor) -> Sequence[Tensor | None]:
    return x, None, weight.t_() if weight.dim() == 2 else weight, x


RECORDABLE = [casts, copies, views, zeros, products, sums, convolutions, own_ops, lists, an_input]


def recorded(function: Function, given: list[Tensor]) -> tuple[Recorder, Sequence[Tensor | None]]:
    recorder = Recorder(given)
    with torch.no_grad(), recorder:
        out = function(*given)
    return recorder, out


def replayed(function: Function, given: list[Tensor], others: list[Tensor]) -> list[Tensor | None]:
    """The function of `others`, by its recording of `given`."""
    recorder, out = recorded(function, given)
    words, operators, slots, _ = recorder.finished(out)
    number = NATIVE.recording_add(words, operators)
    with torch.no_grad():
        made, _ = NATIVE.replay(number, others)
    NATIVE.recording_drop(number)
    places = sorted({s for s in slots if s >= len(given)})
    tensors = {**dict(enumerate(others)), **dict(zip(places, made, strict=True))}
    return [tensors.get(s) for s in slots]


def assert_replayed(function: Function) -> None:
    """Its recording of some tensors gives of others what it gives of them."""
    others = inputs(1)
    found = replayed(function, inputs(), others)
    expected = function(*inputs(1))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
            assert torch.equal(a, b)


@pytest.mark.parametrize("function", RECORDABLE)
def test_a_replay_gives_what_the_function_gives(function: Function) -> None:
    assert_replayed(function)


def test_an_output_that_is_an_input_is_that_input() -> None:
    others = inputs(1)
    assert replayed(an_input, inputs(), others)[0] is others[0]


REFUSED: dict[str, tuple[Function, str]] = {
    "a number": (lambda x, w: (x * x.sum().item(),), "a result that is a float"),
    "random": (lambda x, w: (F.dropout(x, 0.5, True),), "random numbers"),
    "another dtype's view": (lambda x, w: (w.view(torch.int32),), "a view of another dtype"),
    "kept elsewhere": (lambda x, w: (x + KEPT,), "a tensor that is kept elsewhere"),
    "a sum into an input": (lambda x, w: (x.add_(x),), "a sum in place that is no plain one"),
    "a sum into a view": (lambda x, w: (x.clone()[1:].add_(x[1:]),), "a sum in place that is no plain one"),
    "a scalar": (lambda x, w: (x * 2,), "a tensor that is kept elsewhere|an argument of the type"),
    "several views": (lambda x, w: x.unbind(0), "several views at once"),
    "a complex number": (lambda x, w: (torch.complex(x, x),), "a tensor of torch.complex64"),
}
KEPT = torch.ones(1)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_named_and_computed(name: str) -> None:
    function, problem = REFUSED[name]
    given = inputs()
    recorder, out = recorded(function, given)
    torch.manual_seed(0)
    assert out[0] is not None
    with pytest.raises(UnrecordableError, match=problem):
        recorder.finished([None if t.dtype.is_complex else t for t in out if t is not None])
        code.form(out[0])  # of a dtype that no recording knows


def says_finite(x: Tensor, weight: Tensor) -> Sequence[Tensor | None]:
    """Four results of which some are optional, and a flag."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    y, *rest, finite = NATIVE.conv3x3_forward(x, weight, *[None] * 7, False, True, 2)
    assert finite is True
    return y, *rest


def test_a_flag_is_recorded_where_it_is_constant() -> None:
    """A kernel of the CPU may find an infinity next time, one of a GPU has nobody who reads what it says."""
    given = inputs()
    recorder, out = recorded(says_finite, given)
    with pytest.raises(UnrecordableError, match="a result that is a bool"):
        recorder.finished(out)
    recorder = Recorder(given, flags_are_constant=True)
    with torch.no_grad(), recorder:
        out = says_finite(*given)
    words, operators, *_ = recorder.finished(out)
    number = NATIVE.recording_add(words, operators)
    others = inputs(1)
    for a, b in zip(
        NATIVE.replay(number, others)[0], (t for t in says_finite(*others) if t is not None), strict=True
    ):
        assert torch.equal(a, b)
    NATIVE.recording_drop(number)


def test_an_input_given_twice_is_refused() -> None:
    x, _ = inputs()
    with pytest.raises(UnrecordableError, match="given twice"):
        Recorder([x, x])


def test_what_is_read_no_more_is_given_back() -> None:
    """As Python does: after the last step that takes it, and never an output or an input."""

    def chain(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
        a = x.clone()
        b = a.clone()
        del a
        return (b.clone(),)

    recorder, out = recorded(chain, inputs())
    made = {recorder.slot(t) for t in out}
    steps = code.with_frees(recorder.steps, made, 2)
    freed = [(i, step.words[1:]) for i, step in enumerate(steps) if step.opcode is Opcode.FREE]
    # each clone is two steps; the first is freed after the second, the second after the third
    assert [i for i, _ in freed] == [4, 7]
    assert not made & {slot for _, slots in freed for slot in slots}


def test_writing_into_an_input_is_noted_with_its_step() -> None:
    def writes(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
        y = x.clone()
        weight.view(-1)[3:].copy_(y.view(-1)[: 8 * 8 * 9 - 3] if y.numel() > 573 else weight.view(-1)[3:])
        return (y,)

    recorder, out = recorded(writes, inputs())
    *_, first = recorder.finished(out)
    assert set(recorder.mutated) == {1}
    assert first > 0


def compiled(signature: dict[str, str], **metadata: object) -> SimpleNamespace:
    values = {"num_ctas": 1, "num_warps": 4, "shared": 1024, **metadata}
    return SimpleNamespace(
        metadata=SimpleNamespace(**values), src=SimpleNamespace(signature=signature), function=0x7F00
    )


SIGNATURE = {"a": "*fp32", "n": "i32", "big": "i64", "eps": "fp32", "none": "constexpr", "C": "constexpr"}


def test_a_launch_is_written_down_with_its_parameters() -> None:
    x, weight = inputs()
    recorder = Recorder([x, weight])
    recorder.launched(
        compiled(SIGNATURE), (3, 2), {"a": weight, "n": -5, "big": 2**40, "eps": 0.5, "none": None, "C": 8}
    )
    (step,) = recorder.steps
    pointer, i32, i64, f32 = (
        w.value for w in (code.Word.POINTER, code.Word.INT32, code.Word.INT64, code.Word.FLOAT)
    )
    parameters = pointer, 1, i32, -5, i64, 2**40, f32, 0x3F000000
    assert step.words == (0x7F00, 3, 2, 1, 128, 1024, 4, *parameters)
    assert step.read == (1,)
    assert recorder.kernels  # what holds it loaded


@pytest.mark.parametrize(
    "metadata", [{"num_ctas": 2}, {"launch_cooperative_grid": True}, {"global_scratch_size": 16}]
)
def test_a_launch_of_another_kind_is_refused(metadata: dict[str, object]) -> None:
    recorder = Recorder(inputs())
    recorder.launched(compiled({}, **metadata), (1,), {})
    with pytest.raises(UnrecordableError, match="a way of its own"):
        recorder.finished([])


def test_a_parameter_of_another_type_is_refused() -> None:
    recorder = Recorder(inputs())
    recorder.launched(compiled({"a": "tensordesc<fp16>"}), (1,), {"a": None})
    with pytest.raises(UnrecordableError, match="a parameter of the type tensordesc"):
        recorder.finished([])
