"""What `fusedres study` refuses: one line on stderr, exit code 2, and nothing overwritten."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import tiny_studies
import torch
from tiny_studies import picture, study

from fusedres.cli.study import data, main, store


@pytest.fixture
def small(monkeypatch):
    """The command at the tiny size, on few digits."""
    tiny_studies.use(monkeypatch)


def refused(result, *parts):
    """One line on stderr, and exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.startswith("fusedres study: ")
    assert result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts), result.stderr


def test_an_unknown_study_is_refused(tmp_path):
    result = study("depths", "--output", tmp_path / "new")
    refused(result, "no study 'depths'", "gradients, depth, exits, landscape, all")
    assert not (tmp_path / "new").exists()


def test_folders_that_cannot_be_studied(tmp_path):
    output = ("--output", tmp_path / "new")
    refused(study("depth", "--data", tmp_path / "none", *output), "is no folder")
    (tmp_path / "a" / "cat").mkdir(parents=True)
    (tmp_path / "a" / "cat" / "notes.txt").write_text("no image")
    refused(study("depth", "--data", tmp_path / "a", *output), "no images in sub-folders")
    for i in range(4):
        picture(tmp_path / "a" / "cat" / f"{i}.png")
    refused(study("depth", "--data", tmp_path / "a", *output), "one class, 'cat'")
    picture(tmp_path / "a" / "dog" / "0.png")
    refused(study("depth", "--data", tmp_path / "a", *output), "class 'dog'", "has 1 images", "4 at least")
    for i in range(4):
        picture(tmp_path / "a" / "dog" / f"{i}.png")
    (tmp_path / "a" / "dog" / "0.png").write_bytes(b"not a picture")
    refused(study("depth", "--data", tmp_path / "a", *output), "0.png cannot be read as an image")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seeds": [5, 6]}, "seeds"),
        ({"format": 99}, "format 99"),
        ({"fusedres": "0.0.1"}, "fusedres '0.0.1'"),
        ({"digest": "other"}, "digest 'other'"),
    ],
)
def test_files_of_another_study_are_refused_and_kept(changed, said, tmp_path, small):
    folder = tmp_path / main.RESUME
    store.Store(folder).open(main.identity(tiny_studies.of_seeds((0, 1)), data.digits()))
    kept = {**json.loads((folder / store.SETTINGS).read_text()), **changed}
    (folder / store.SETTINGS).write_text(json.dumps(kept))
    refused(study("depth", "--quick", "--seeds", 2, "--output", tmp_path), said, "--output", "begin anew")
    assert json.loads((folder / store.SETTINGS).read_text()) == kept
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == [store.SETTINGS]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_settings_file_that_is_none_is_refused(content, tmp_path, small):
    (tmp_path / main.RESUME).mkdir()
    (tmp_path / main.RESUME / store.SETTINGS).write_text(content)
    refused(study("depth", "--quick", "--output", tmp_path), store.SETTINGS, "begin anew")


def test_a_result_or_weights_that_are_cut_short_are_named(tmp_path):
    found = store.Store(tmp_path)
    found.path("task", "json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"task\.json cannot be read .* remove it"):
        found.load("task")
    found.save_weights("task", {"w": torch.ones(3)})
    found.path("task", "pt").write_bytes(found.path("task", "pt").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"task\.pt cannot be read .* train that network again"):
        found.load_weights("task")


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, small, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    (tmp_path / "depth.png").write_bytes(b"of an earlier run")
    monkeypatch.setattr(Path, "write_bytes", full)
    result = study("depth", "--quick", "--output", tmp_path)
    refused(result, store.SETTINGS, "cannot be written (No space left on device)", "make room")
    assert (tmp_path / "depth.png").read_bytes() == b"of an earlier run"
    assert not list(tmp_path.rglob("*.partial"))


def test_a_missing_library_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("fusedres.cli.study", "jinja2"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = study("depth")
    assert result.exit_code == 1
    assert (
        result.output
        == "fusedres study needs jinja2, which is not installed: pip install 'fusedres[study]'\n"
    )
