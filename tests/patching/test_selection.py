"""Which blocks are named, what a name that fits none does, and what is said of those left out."""

from __future__ import annotations

import warnings

import pytest
import torch
from block_forms import ran_as
from look_alikes import LeakyReLUs
from spellings import InPlaceAdd, SqueezeExcite
from torch import nn

import fusedres
from fusedres.models import cifar_resnet


@pytest.mark.parametrize("include", ["layr*", ["layr*", "layer1"], []])
def test_include_that_names_no_block_raises(include):
    model = cifar_resnet(20)
    with pytest.raises(ValueError, match=r"matches no block.*'stem', 'layer1\.0'.* and 2 more"):
        fusedres.patch(model, include=include)
    assert not fusedres.is_patched(model)


def test_include_that_names_some_blocks_is_enough():
    model = fusedres.patch(cifar_resnet(20), include=["layr*", "layer1.*"])
    assert len(fusedres.report(model).matched) == 3


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("patterns", [3, [3], b"layer1", [None]])
def test_what_is_no_pattern_raises(option, patterns):
    with pytest.raises(TypeError, match=rf"{option} needs a pattern or a list of patterns, found"):
        fusedres.patch(cifar_resnet(20), **{option: patterns})


def test_a_warning_where_no_block_could_be_patched():
    model = nn.Sequential(SqueezeExcite(), LeakyReLUs(), LeakyReLUs())
    with pytest.warns(
        UserWarning, match=r"no residual block of Sequential.*2 of 3 because only ReLU"
    ) as found:
        fusedres.patch(model)
    assert len(found) == 1 and "fusedres.report(model)" in str(found[0].message)
    assert found[0].filename == __file__


@pytest.mark.parametrize("options", [{"exclude": "*"}, {"dry_run": True}, {"include": "0"}])
def test_no_warning_where_blocks_are_left_out_by_name_or_nothing_is_patched(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.Sequential(InPlaceAdd(), SqueezeExcite()).to(memory_format=torch.channels_last)
        fusedres.patch(model, **options)


def test_the_report_shows_what_is_excluded():
    model = fusedres.patch(cifar_resnet(20), exclude="layer1.*", recipe="separate")
    model(torch.randn(2, 3, 8, 8))
    codes = {row.name: row.code for row in fusedres.report(model).skipped}
    assert codes == dict.fromkeys(("layer1.0", "layer1.1", "layer1.2"), "excluded")
    assert "left out by include or exclude" in str(fusedres.report(model)) and ran_as(model, "separate")
    assert {row.code for row in fusedres.report(model.layer1).blocks} == {"excluded"}
    fusedres.patch(model, include="layer1.*")
    assert {row.code for row in fusedres.report(model).skipped} == {"excluded"}
    assert {row.code for row in fusedres.report(fusedres.patch(model)).blocks} == {None}
    fusedres.patch(model, exclude="layer1.*")
    assert {row.code for row in fusedres.report(fusedres.unpatch(model)).blocks} == {None}


def test_is_patched_of_what_is_no_module_raises():
    with pytest.raises(TypeError, match=r"fusedres\.is_patched: needs a torch\.nn\.Module, found NoneType"):
        fusedres.is_patched(None)
