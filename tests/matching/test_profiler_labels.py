"""Blocks that label parts of themselves for profilers are left alone: profiles of a patched model keep the labels."""

from __future__ import annotations

import pytest
import torch
from same_model import images
from spellings import InPlaceAdd
from torch import nn
from torch.autograd import profiler
from torch.cuda import nvtx
from torch.profiler import itt, profile, record_function

import fusedres

Fast = torch._C._profiler._RecordFunctionFast


class Context(InPlaceAdd):
    def forward(self, x):
        with record_function("a::label"):
            return super().forward(x)


class Decorator(InPlaceAdd):
    @profiler.record_function("a::label")
    def forward(self, x):
        return InPlaceAdd.forward(self, x)


class KeptLabel(InPlaceAdd):
    def __init__(self) -> None:
        super().__init__()
        self.label = Fast("a::label")

    def forward(self, x):
        with self.label:
            return super().forward(x)


class UnderAProfilerOnly(InPlaceAdd):
    def forward(self, x):
        if not torch.autograd._profiler_enabled():
            return super().forward(x)
        with record_function("a::label"):
            return super().forward(x)


class UnderTorchsProfilersOnly(InPlaceAdd):
    def forward(self, x):
        if not profiler._is_profiler_enabled:
            return super().forward(x)
        with record_function("a::label"):
            return super().forward(x)


class InASubmodule(InPlaceAdd):
    class Labelled(nn.ReLU):
        def forward(self, x):
            with record_function("a::label"):
                return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.relu = self.Labelled()


class InEvaluation(InPlaceAdd):
    def forward(self, x):
        if self.training:
            return super().forward(x)
        handle = torch.ops.profiler._record_function_enter("a::label")
        out = super().forward(x)
        torch.ops.profiler._record_function_exit(handle)
        return out


LABELLED = [
    Context,
    Decorator,
    KeptLabel,
    UnderAProfilerOnly,
    UnderTorchsProfilersOnly,
    InASubmodule,
    InEvaluation,
]


def code(block: nn.Module) -> str | None:
    return fusedres.report(fusedres.patch(nn.ModuleList([InPlaceAdd(), block]))).blocks[1].code


@pytest.mark.parametrize("build", LABELLED)
def test_a_label_is_kept(build):
    model = nn.ModuleList([InPlaceAdd(), build()])
    fusedres.patch(model, recipe="separate")
    rows = fusedres.report(model).blocks
    assert [(row.matched, row.code) for row in rows] == [(True, None), (False, "profiler_label")]
    model.train(build is not InEvaluation)
    with profile() as found:
        model[1](images().float())
    assert "a::label" in {event.key for event in found.key_averages()}


class Ranges:
    """Stands for the library of ranges of a build that has it."""

    def __getattr__(self, name):
        return lambda *args: 0


class WithNvtxRange(InPlaceAdd):
    def forward(self, x):
        with nvtx.range("a label"):
            return super().forward(x)


class WithNvtxMark(InPlaceAdd):
    def forward(self, x):
        nvtx.mark("a label")
        return super().forward(x)


class WithIttRange(InPlaceAdd):
    def forward(self, x):
        itt.range_push("a label")
        out = super().forward(x)
        itt.range_pop()
        return out


@pytest.mark.parametrize("build", [WithNvtxRange, WithNvtxMark, WithIttRange])
def test_a_range_is_kept(build, monkeypatch):
    ranges = Ranges()
    monkeypatch.setattr(nvtx, "_nvtx", ranges)
    monkeypatch.setattr(itt, "_itt", ranges)
    assert code(build()) == "profiler_label"
    assert nvtx._nvtx is ranges and itt._itt is ranges


def test_a_model_is_patched_under_a_profiler_all_the_same():
    with profile():
        assert code(Context()) == "profiler_label" and code(InPlaceAdd()) is None
    with profiler.profile():
        assert code(KeptLabel()) == "profiler_label"
    assert not torch.autograd._profiler_enabled() and not profiler._is_profiler_enabled


def test_labels_around_a_block_change_nothing():
    block = fusedres.patch(InPlaceAdd(), recipe="separate", strict=True)
    with profile() as found, record_function("around"):
        block(images().float())
    assert fusedres.report(block).blocks[0].runs_as == "separate"
    assert "around" in {event.key for event in found.key_averages()}
