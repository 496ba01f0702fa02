"""Patched within a context, disabled within one, and what is logged when a call falls back."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from block_forms import ran_as
from spellings import InPlaceAdd

import fusedres

X = torch.randn(2, 16, 6, 6)


def test_patched_restores_the_model_also_after_an_exception():
    model = InPlaceAdd()
    with pytest.raises(KeyError), fusedres.patched(model, recipe="separate") as inside:
        assert inside is model and fusedres.is_patched(model)
        model(X)
        assert ran_as(model, "separate")
        raise KeyError
    assert type(model) is InPlaceAdd and not fusedres.is_patched(model)


def test_patched_gives_back_earlier_options():
    model = fusedres.patch(InPlaceAdd(), recipe="unfused")
    with fusedres.patched(model, recipe="separate"):
        model(X)
        assert ran_as(model, "separate")
    (row,) = fusedres.report(model).blocks
    assert row.recipe == "unfused" and row.matched


def test_disabled_runs_the_original_forward():
    model = fusedres.patch(InPlaceAdd(), recipe="separate")
    with fusedres.disabled():
        y = model(X)
    (row,) = fusedres.report(model).blocks
    assert row.runs_as == "unfused" and row.code == "disabled"
    assert type(y.grad_fn).__name__ == "ReluBackward0"
    model(X)
    assert ran_as(model, "separate")


def test_a_fallback_is_logged_once_per_reason(caplog):
    class OnlyHere(InPlaceAdd):
        pass

    model = fusedres.patch(OnlyHere(), recipe="separate")
    with caplog.at_level(logging.INFO, logger="fusedres"), fusedres.disabled():
        model(X)
        model(X)
    lines = [r.message for r in caplog.records if "OnlyHere runs" in r.message]
    assert len(lines) == 1 and "unfused: disabled" in lines[0]


def test_a_fallback_is_logged_once_whatever_its_detail(caplog):
    class OfManySizes(InPlaceAdd):
        pass

    model = fusedres.patch(OfManySizes(), recipe="separate")
    with caplog.at_level(logging.INFO, logger="fusedres"):
        for channels in (3, 4, 5):
            with contextlib.suppress(RuntimeError):  # the original forward rejects them
                model(torch.randn(2, channels, 6, 6))
            assert fusedres.report(model).blocks[0].code == (
                f"input_channels:input of conv1, {channels} channels, needed 16"
            )
    assert sum("OfManySizes runs" in r.message for r in caplog.records) == 1
