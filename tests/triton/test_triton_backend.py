"""Which calls the Triton backend takes, with the reason against the others; nothing is launched here."""

import contextlib
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from fusedres.ops import triton as triton_backend
from fusedres.ops import triton_reasons
from fusedres.ops.backend import REASONS, Backend
from fusedres.ops.contract import RAW_OPS, BatchNormVectors, BnStats, Conv1x1Forward, op_name
from fusedres.ops.dispatch import Dispatcher, dispatcher
from fusedres.ops.reference import REFERENCE

NHWC = torch.channels_last


def interpreted():
    return triton_backend.backend(partial(triton_reasons.device_reason, interpreted=True))


def activation(*shape, dtype=torch.float16, memory_format=NHWC):
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=memory_format)


def test_serves_every_raw_op_that_has_a_launcher():
    names = {op_name(op) for op in triton_backend.backend().functions}
    assert names == set(triton_backend.launchers().__all__) <= set(RAW_OPS)
    assert set(triton_reasons.DECIDING) == set(triton_backend.LAUNCHES)


def test_cpu_tensors_only_under_the_interpreter(monkeypatch):
    c = activation(2, 8, 3, 3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_backend.backend().reason(BnStats(c)) == "device_cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.backend().reason(BnStats(c)) is None
    assert interpreted().reason(BnStats(c.to("meta"))) == "device_meta"


def strided(channels):
    return torch.ones(channels, 2)[:, 0]


def vectors(*each):
    return BatchNormVectors(*each, *(torch.ones(8) for _ in range(5 - len(each))))


@pytest.mark.parametrize(
    ("op", "arguments", "reason"),
    [
        ("bn_stats", (activation(2, 8, 3, 3, dtype=torch.float64),), "dtype_float64"),
        ("bn_stats", (activation(2, 8, 3, 3, dtype=torch.bfloat16),), "bfloat16_interpreted"),
        ("bn_stats", (activation(0, 8, 3, 3),), "empty"),
        ("bn_stats", (activation(2, 8, 3, 3, memory_format=torch.contiguous_format),), "not_channels_last"),
        ("bn_stats", (activation(2, 8, 3, 6)[..., ::2],), "not_channels_last"),
        ("bn_stats", (torch.empty((2**31, 1, 1, 1), dtype=torch.float16),), "too_many_rows"),
        ("conv1x1_forward", (activation(2, 8, 3, 3), torch.zeros(4, 8, 1, 1)), "mixed_dtypes"),
        (
            "bn_relu_maxpool_backward_reduce",
            (activation(0, 8, 2, 2), None, activation(0, 8, 4, 4), None, 3, 2, 1),
            "empty",
        ),
        ("gram", (activation(1, 4096, 1, 1), None, None), None),
        ("gram", (activation(1, 16384, 1, 1), None, None), "too_many_channels"),
        (
            "conv1x1_backward_weight",
            (activation(1, 8192, 1, 1), None, activation(1, 2048, 1, 1), None, None),
            None,
        ),
        (
            "conv1x1_backward_weight",
            (activation(1, 16384, 1, 1), None, activation(1, 4096, 1, 1), None, None),
            "too_many_channels",
        ),
        (
            "conv_backward_weight",
            (activation(2, 8, 3, 3),) * 2 + ((3, 3), (1, 1), (1, 1), (1, 1), 1),
            "no_kernel",
        ),
        ("bn_scale_shift", (torch.zeros(8), torch.ones(8), None, None, 1e-5), None),
        (
            "bn_scale_shift",
            (torch.zeros(8).double(), torch.ones(8).double(), None, None, 1e-5),
            "dtype_float64",
        ),
        ("gram", (activation(2, 8, 3, 3), torch.ones(8), torch.ones(8)), None),
        ("bn_scale_shift", (torch.zeros(8), torch.ones(8), strided(8), None, 1e-5), "vector_not_dense"),
        ("bn_scale_shift", (strided(8), torch.ones(8), None, None, 1e-5), "vector_not_dense"),
        (
            "bn_scale_shift",
            (torch.zeros(8), torch.ones(8), None, torch.ones(1).expand(8), 1e-5),
            "vector_not_dense",
        ),
        ("bn_scale_shift", (torch.zeros(1), torch.ones(1), strided(1), None, 1e-5), None),
        (
            "bn_add_relu_backward_reduce",
            (activation(2, 8, 3, 3), activation(2, 8, 3, 3), vectors(strided(8))),
            "vector_not_dense",
        ),
        ("conv1x1_forward", (activation(2, 8, 3, 3), activation(4, 8, 1, 1), strided(4)), "vector_not_dense"),
        ("conv1x1_forward", (activation(1, 64, 1, 1), activation(16384, 64, 1, 1)), None),
        (
            "conv1x1_forward",
            (activation(1, 64, 1, 1), torch.empty((2**15, 64, 1, 1), dtype=torch.float16)),
            "too_many_channels",
        ),
        ("gram_output_stats", (activation(32, 8, 1, 1), None, torch.ones(8), torch.ones(8, 8)), None),
        (
            "gram_output_stats",
            (activation(8, 32, 1, 1).transpose(0, 1), None, None, None),
            "not_channels_last",
        ),
        (
            "gram_backward_coefficients",
            (None, None, activation(32, 8, 1, 1, dtype=torch.float64), None, None, 9),
            "dtype_float64",
        ),
    ],
)
def test_reason(op, arguments, reason):
    assert interpreted().reason(RAW_OPS[op](*arguments)) == reason
    assert reason is None or any(reason == code or reason.startswith(f"{code}_") for code in REASONS)


def test_every_argument_of_a_record_counts():
    op = Conv1x1Forward(
        activation(2, 8, 3, 3), activation(4, 8, 1, 1), scale=torch.ones(4), shift=torch.ones(4)
    )
    backend, bad = interpreted(), op._replace(scale=strided(4))
    assert backend.reason(op) is None and backend.reason(bad) == "vector_not_dense"
    residual = activation(2, 4, 3, 3, dtype=torch.float32)
    assert backend.reason(op._replace(residual=residual)) == "mixed_dtypes"
    with pytest.raises(Refused, match="conv1x1_forward"):
        Dispatcher((backend, REFUSAL))(bad)


class Refused(Exception):
    """A call that no backend before the last one served."""


def refuse(op):
    raise Refused(op_name(type(op)))


REFUSAL = Backend("refusal", {Conv1x1Forward: refuse})


def test_gpus_of_another_make_are_left_to_the_next_backend(monkeypatch):
    tensor = mock.MagicMock(dtype=torch.float16, is_cuda=True)
    monkeypatch.setattr(triton_reasons, "capability", lambda device: (9, 4))
    monkeypatch.setattr(triton_reasons, "unusable", lambda device: None)
    assert triton_reasons.device_reason(tensor, interpreted=False) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert triton_reasons.device_reason(tensor, interpreted=False) == "rocm"


def test_a_call_that_triton_leaves_goes_to_the_reference():
    op, ops = BnStats(torch.randn(2, 8, 3, 3)), dispatcher("triton")
    assert [backend.reason(op) for backend in ops.backends] == ["device_cpu", None]
    assert ops.serving(op) is REFERENCE
    assert torch.equal(ops(op)[0], dispatcher("reference")(op)[0])


def test_triton_is_imported_at_the_first_served_op():
    code = (
        "import sys, torch; from fusedres.ops.dispatch import dispatcher; from fusedres.ops.contract import BnStats;"
        "dispatcher()(BnStats(torch.randn(2, 3, 4, 4))); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize("op", triton_backend.LAUNCHES, ids=op_name)
def test_every_launch_is_on_the_device_of_its_tensors(op, monkeypatch):
    """The argument that decides sets the current device, and the launch happens while it is set."""
    current = []

    @contextmanager
    def on_device_of(tensor):
        current.append(tensor)
        yield
        current.clear()

    class Launchers:
        def __getattr__(self, name):
            def launch(*args):
                launched.append((name, list(current)))
                return mock.MagicMock(), mock.MagicMock(), mock.MagicMock(), None

            return launch

    launched = []
    monkeypatch.setattr(triton_backend, "on_device_of", on_device_of)
    monkeypatch.setattr(triton_backend, "launchers", Launchers)
    record = op(*(mock.MagicMock(name=name) for name in op._fields))
    with contextlib.suppress(TypeError, ValueError):  # the results are no tensors
        triton_backend.backend()(record)
    assert launched == [(op_name(op), [getattr(record, triton_reasons.DECIDING[op])])]


def test_the_guard_is_the_device_of_the_tensor(monkeypatch):
    """There is none where that device is the current one, and for a tensor on the CPU."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: ("guard", device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    first, second = (mock.MagicMock(is_cuda=True, device=torch.device("cuda", i)) for i in (0, 1))
    assert triton_backend.on_device_of(second) == ("guard", torch.device("cuda", 1))
    for tensor in (first, torch.zeros(1)):
        with triton_backend.on_device_of(tensor) as nothing:
            assert nothing is None
