"""Where the library is looked for, and what is said where there is none."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from spellings import InPlaceAdd

import fusedres
from fusedres.ops.native import library
from fusedres.patching import api


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """A checkout without a library of its own, and two folders of packages, of which the second has one."""
    for folder in ("checkout/fusedres", "checkout/csrc", "first/fusedres", "second/fusedres"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "second" / "fusedres" / library.FILE).touch()
    monkeypatch.setattr(library, "PACKAGE", tmp_path / "checkout" / "fusedres")
    monkeypatch.setattr(library, "SOURCES", tmp_path / "checkout" / "csrc")
    return tmp_path


def found(folder):
    places = [str(folder / name) for name in ("checkout", "first", "second")]
    return library.find(folder / "checkout" / "fusedres", places).relative_to(folder)


def test_a_checkout_takes_the_library_of_the_package_installed(checkout):
    assert str(found(checkout)) == f"second/fusedres/{library.FILE}"


def test_a_library_of_its_own_goes_first(checkout):
    (checkout / "checkout" / "fusedres" / library.FILE).touch()
    assert str(found(checkout)) == f"checkout/fusedres/{library.FILE}"


def test_an_installed_package_takes_no_other(checkout):
    (checkout / "checkout" / "csrc").rmdir()
    assert str(found(checkout)) == f"checkout/fusedres/{library.FILE}"


def test_a_library_that_is_older_than_the_sources_is_told_of(checkout, monkeypatch):
    built = checkout / "second" / "fusedres" / library.FILE
    monkeypatch.setattr(library, "LIBRARY", built)
    monkeypatch.setattr(library, "load", lambda: None)
    source = checkout / "checkout" / "csrc" / "bn.cpp"
    source.touch()
    os.utime(source, (1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.is_usable()
    os.utime(built, (0, 0))
    with pytest.warns(RuntimeWarning, match=r"is older than its sources. Build it again: pip install"):
        assert library.is_usable()


@pytest.mark.parametrize(
    ("recipe", "here", "said"), [("auto", True, 1), ("separate", True, 0), ("auto", False, 0)]
)
def test_patch_says_once_that_there_are_no_kernels(checkout, monkeypatch, recipe, here, said):
    """Where they could be built, and nobody asked for a recipe of plain PyTorch."""
    monkeypatch.setattr(library, "LIBRARY", checkout / "first" / "fusedres" / library.FILE)
    (checkout / "first" / "fusedres" / library.NOTE).write_text("pure package: torch not found")
    monkeypatch.setattr(library, "could_be_built", lambda: here)
    api.warn_without_kernels.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            fusedres.patch(InPlaceAdd().to(memory_format=torch.channels_last), recipe=recipe)
    api.warn_without_kernels.cache_clear()
    messages = [str(w.message) for w in caught]
    assert len(messages) == said and all(w.filename == __file__ for w in caught)
    assert all(
        "(pure package: torch not found)" in m and "pip install" in m and "\n" not in m for m in messages
    )
