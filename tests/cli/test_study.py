"""`fusedres study`: what it writes, what it refuses, and that a run that was killed goes on where it was."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import studies
import torch
from PIL import Image
from typer.testing import CliRunner

from fusedres.cli.app import app
from fusedres.cli.study import data, main, panels, settings, store, tasks

SUPPORT = Path(studies.__file__).parent


def tiny(seeds):
    return replace(studies.TINY, seeds=seeds)


def few(images):
    return images


@pytest.fixture
def small(monkeypatch):
    """The command at the tiny size, on few digits."""
    monkeypatch.setattr(settings, "quick", tiny)
    monkeypatch.setattr(data, "digits", partial(few, studies.few_images()))


def study(*arguments, **options):
    return CliRunner().invoke(app, ["study", *map(str, arguments)], **options)


def refused(result, *parts):
    """One line on stderr, and exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.startswith("fusedres study: ")
    assert result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts), result.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`study all` at the tiny size."""
    output = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(settings, "quick", tiny)
        patching.setattr(data, "digits", partial(few, studies.few_images()))
        arguments = ("all", "--quick", "--seeds", 2, "--workers", 1, "--output", output)
        result = study(*arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return output, result.stdout


def test_all_writes_tables_pictures_results_and_the_page(whole):
    output, stdout = whole
    found = json.loads((output / "results.json").read_text())
    assert list(found["studies"]) == ["gradients", "depth", "exits", "landscape"]
    page = (output / "index.html").read_text()
    for name, one in found["studies"].items():
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert one["comparison"]["error"] <= one["comparison"]["limit"]
        for claim in one["claims"]:
            assert claim["sentence"] in stdout and re.search(r"\d", claim["sentence"])
            assert ("shows here" in claim["sentence"]) == claim["shows"]
    assert page.count("<section ") == 4 and page.count("<img ") == page.count(
        'src="data:image/svg+xml;base64,'
    )
    sentences = [c["sentence"] for one in found["studies"].values() for c in one["claims"]]
    assert page.count('<li class="shows">') + page.count('<li class="not">') == len(sentences)


@pytest.mark.parametrize("name", studies.DIRECTIONS)
def test_the_directions_show(name, whole):
    found = json.loads((whole[0] / "results.json").read_text())["studies"][name]
    for beginning in studies.DIRECTIONS[name]:
        assert any(claim.startswith(beginning) for claim in studies.shown(found)), beginning


def test_the_page_needs_no_network(whole):
    page = (whole[0] / "index.html").read_text()
    assert (
        not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
        and "@import" not in page
        and "<script" not in page
    )


def test_the_pictures_follow_from_the_results(whole):
    """Every panel is drawn from what results.json holds, and the same each time."""
    found = json.loads((whole[0] / "results.json").read_text())["studies"]
    for name, (_, _, drawn) in main.STUDIES.items():
        twice = [panels.svg(drawn(found[name]["data"])[:2]) for _ in range(2)]
        assert twice[0] == twice[1] and "<svg" in twice[0]


def test_one_study_goes_on_from_what_all_did_and_prints_json(whole, small):
    """No task is done again: its summary is that of the earlier run."""
    output, _ = whole
    before = {file: file.stat().st_mtime_ns for file in (output / main.RESUME).iterdir()}
    result = study("depth", "--quick", "--seeds", 2, "--output", output, "--json", catch_exceptions=False)
    assert before == {file: file.stat().st_mtime_ns for file in (output / main.RESUME).iterdir()}
    earlier = json.loads((output / "results.json").read_text())["studies"]["depth"]
    assert json.loads(result.stdout)["studies"] == {"depth": earlier}


def test_an_unknown_study_is_refused(tmp_path):
    result = study("depths", "--output", tmp_path / "new")
    refused(result, "no study 'depths'", "gradients, depth, exits, landscape, all")
    assert not (tmp_path / "new").exists()


def picture(file, colour=(200, 10, 10)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12), colour).save(file)


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


def test_a_folder_of_images(tmp_path):
    for name, colour in (("dark", (10, 0, 0)), ("light", (250, 250, 250))):
        for i in range(8):
            picture(tmp_path / name / f"{i}.png", colour)
    images = data.folder(tmp_path, 9)
    assert images.classes == ("dark", "light") and images.channels == 3
    assert images.train.shape == (12, 3, 9, 9) and images.test.shape == (4, 3, 9, 9)
    assert (images.train.mean((1, 2, 3)) > 0).long().tolist() == images.train_labels.tolist()
    assert sorted(images.test_labels.tolist()) == [0, 0, 1, 1]


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
    store.Store(folder).open(main.identity(tiny((0, 1)), data.digits()))
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
    assert (
        result.exit_code == 2
        and "No space left on device" in result.stderr
        and result.stderr.count("\n") == 1
    )
    assert (tmp_path / "depth.png").read_bytes() == b"of an earlier run"
    assert not list(tmp_path.rglob("*.partial"))


PROGRAM = """
import dataclasses
import sys
sys.path.insert(0, sys.argv[1])
import studies
from fusedres.cli.app import app
from fusedres.cli.study import data, settings
if __name__ == "__main__":
    images = studies.few_images()
    settings.quick = lambda seeds: dataclasses.replace(studies.TINY, seeds=seeds)
    data.digits = lambda: images
    app(sys.argv[2:], prog_name="fusedres")
"""


def workers_of(pid):
    """The processes that this one started, and that run."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()]


def runs(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc to see a run's workers")
def test_a_run_that_was_killed_goes_on_with_equal_results(tmp_path, small, whole):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    command = (
        "study",
        "depth",
        "--quick",
        "--seeds",
        "2",
        "--workers",
        "2",
        "--output",
        str(tmp_path / "out"),
    )
    resume = tmp_path / "out" / main.RESUME
    run = subprocess.Popen([sys.executable, "-P", file, SUPPORT, *command], stderr=subprocess.PIPE)
    within(120, lambda: len(list(resume.glob("training-*.json"))) >= 2 or run.poll() is not None)
    workers = workers_of(run.pid)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert len(workers) >= 2
    within(20, lambda: not any(map(runs, workers)))
    done = {path: path.stat().st_mtime_ns for path in resume.glob("*.json")}
    assert 2 <= len(done) - 1 < len(list(main.STUDIES["depth"][0](tiny((0, 1))))), "it was killed in between"
    result = study(*command[1:-3], 1, *command[-2:], catch_exceptions=False)
    assert result.exit_code == 0
    assert done == {path: path.stat().st_mtime_ns for path in done}, "nothing was done twice"
    again = json.loads((tmp_path / "out" / "depth.json").read_text())["studies"]["depth"]
    assert again == json.loads((whole[0] / "results.json").read_text())["studies"]["depth"]


def test_an_exception_of_a_worker_ends_the_run(tmp_path, small):
    images = studies.few_images()
    context = tasks.Context(studies.TINY, images, store.Store(tmp_path))
    with pytest.raises(TypeError):
        tasks.run(context, [tasks.Task("wrong", len, ())], 2, lambda *step: None)


def test_progress_tells_every_task_in_order(tmp_path):
    told = []
    context = tasks.Context(studies.TINY, studies.few_images(), store.Store(tmp_path))
    work = [tasks.Task(name, lambda context: {}, after=after) for name, after in (("late", 1), ("early", 0))]
    tasks.run(context, work, 1, lambda *step: told.append(step))
    assert told == [("early", 0, 2), ("late", 1, 2)]


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
