"""Forwards that take another path, or raise, for other dtypes, layouts, devices or frozen parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from spellings import InPlaceAdd
from test_input_checks import Checked, outcome

import fusedres


class OfTheDtype(Checked):
    def check(self, x):
        if x.dtype is torch.bfloat16:
            raise TypeError("no bfloat16")


class OfTheLayout(Checked):
    def check(self, x):
        assert x.is_contiguous(), "not contiguous"


class OfTheDevice(Checked):
    def check(self, x):
        if x.device.type == "cpu":
            raise ValueError("not on the CPU")


CHANNELS_LAST = torch.ones(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
KINDS = {
    OfTheDtype: (CHANNELS_LAST.bfloat16(), "checks_input:TypeError"),
    OfTheLayout: (CHANNELS_LAST, "checks_input:AssertionError"),
    OfTheDevice: (CHANNELS_LAST, "asks_device"),
}


@pytest.mark.parametrize("build", KINDS)
@pytest.mark.filterwarnings("ignore:fusedres.patch. no residual block")
def test_dtypes_layouts_and_devices(build):
    x, code = KINDS[build]
    plain = build().to(x.dtype)
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    expected = outcome(plain, x)
    assert isinstance(expected, tuple) and outcome(fused, x) == expected
    assert fusedres.report(fused).blocks[0].code == code


class TwiceInFloat32(InPlaceAdd):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if y.dtype is torch.float32 else y


class GivesFloat64(InPlaceAdd):
    """A cast that a run in float64 does not show."""

    def forward(self, x):
        return super().forward(x).double()


class Reformats(InPlaceAdd):
    def forward(self, x):
        if not x.is_contiguous():
            x = x.contiguous()
        return super().forward(x)


class TwiceWhenFrozen(InPlaceAdd):
    def forward(self, x):
        y = super().forward(x)
        return y if self.bn1.weight.requires_grad else y * 2


PATHS = {
    TwiceInFloat32: "dtype_dependent",
    GivesFloat64: "dtype_dependent",
    Reformats: "layout_dependent",
    TwiceWhenFrozen: "grad_mode_dependent",
}


@pytest.mark.parametrize("build", PATHS)
@pytest.mark.filterwarnings("ignore:fusedres.patch. no residual block")
def test_other_paths_for_other_kinds_of_tensors(build):
    torch.manual_seed(0)
    plain = build().requires_grad_(build is not TwiceWhenFrozen)
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    expected, found = plain(CHANNELS_LAST), fused(CHANNELS_LAST)
    assert torch.equal(found, expected) and found.dtype is expected.dtype
    assert found.stride() == expected.stride()
    assert fusedres.report(fused).blocks[0].code == PATHS[build]


class NamesTheDtype(InPlaceAdd):
    """As many encoders do; the same in every dtype."""

    def forward(self, x):
        return super().forward(x.to(dtype=self.conv1.weight.dtype))


def test_a_cast_to_the_own_dtype_is_no_other_path():
    model = fusedres.patch(NamesTheDtype(), recipe="separate", strict=True)
    model(CHANNELS_LAST)
    assert fusedres.report(model).blocks[0].runs_as == "separate"
