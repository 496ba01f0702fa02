"""`fusedres study`: what it writes, and that a run that was killed goes on where it was."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_studies
from tiny_studies import picture, study

from fusedres.cli.study import data, main, panels, settings, store, tasks

SUPPORT = Path(tiny_studies.__file__).parent


@pytest.fixture
def small(monkeypatch):
    """The command at the tiny size, on few digits."""
    tiny_studies.use(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, untraced):
    """`study all` at the tiny size."""
    output = tmp_path_factory.mktemp("study")
    with untraced(), pytest.MonkeyPatch.context() as patching:
        tiny_studies.use(patching)
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


@pytest.mark.parametrize("name", tiny_studies.DIRECTIONS)
def test_the_directions_show(name, whole):
    found = json.loads((whole[0] / "results.json").read_text())["studies"][name]
    for beginning in set(tiny_studies.DIRECTIONS[name]) - set(tiny_studies.CHANCE):
        assert any(claim.startswith(beginning) for claim in tiny_studies.shown(found)), beginning


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
    for name, plots in main.PLOTS.items():
        twice = [panels.svg(plots.panels(found[name]["data"])[:2]) for _ in range(2)]
        assert twice[0] == twice[1] and "<svg" in twice[0]


def test_one_study_goes_on_from_what_all_did_and_prints_json(whole, small):
    """No task is done again: its summary is that of the earlier run."""
    output, _ = whole
    before = {file: file.stat().st_mtime_ns for file in (output / main.RESUME).iterdir()}
    result = study("depth", "--quick", "--seeds", 2, "--output", output, "--json", catch_exceptions=False)
    assert before == {file: file.stat().st_mtime_ns for file in (output / main.RESUME).iterdir()}
    earlier = json.loads((output / "results.json").read_text())["studies"]["depth"]
    assert json.loads(result.stdout)["studies"] == {"depth": earlier}


def test_a_folder_of_images(tmp_path):
    for name, colour in (("dark", (10, 0, 0)), ("light", (250, 250, 250))):
        for i in range(8):
            picture(tmp_path / name / f"{i}.png", colour)
    images = data.folder(tmp_path, 9)
    assert images.classes == ("dark", "light") and images.channels == 3
    assert images.train.shape == (12, 3, 9, 9) and images.test.shape == (4, 3, 9, 9)
    assert (images.train.mean((1, 2, 3)) > 0).long().tolist() == images.train_labels.tolist()
    assert sorted(images.test_labels.tolist()) == [0, 0, 1, 1]


def test_a_study_of_a_folder_runs(tmp_path, monkeypatch):
    for name, colour in (("dark", (10, 0, 0)), ("light", (250, 250, 250))):
        for i in range(12):
            picture(tmp_path / "images" / name / f"{i}.png", colour)
    smallest = replace(tiny_studies.TINY, depths=(8,), steps=3, exit_depths=(), landscape_depths=())
    monkeypatch.setattr(settings, "quick", lambda seeds: replace(smallest, seeds=seeds))
    options = ("--data", tmp_path / "images", "--size", 8, "--seeds", 2, "--workers", 1, "--json")
    result = study("depth", "--quick", *options, "--output", tmp_path / "out", catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["images"] == "images, 8 x 8" and (tmp_path / "out/depth.png").exists()
    assert found["studies"]["depth"]["table"][1][0] == "residual, ReLU, BN"
    other = study("depth", "--quick", *options[2:], "--output", tmp_path / "out")
    assert other.exit_code == 2 and "begun with images 'images, 8 x 8'" in other.stderr


PROGRAM = """
import dataclasses
import sys
sys.path.insert(0, sys.argv[1])
import tiny_studies
from fusedres.cli.app import app
from fusedres.cli.study import data, settings
if __name__ == "__main__":
    images = tiny_studies.few_images()
    settings.quick = lambda seeds: dataclasses.replace(tiny_studies.TINY, seeds=seeds)
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


@pytest.mark.no_cover
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
    total = len(main.TASKS["depth"](tiny_studies.of_seeds((0, 1))))
    assert 2 <= len(done) - 1 < total, "it was killed in between"
    result = study(*command[1:-3], 1, *command[-2:], catch_exceptions=False)
    assert result.exit_code == 0
    assert done == {path: path.stat().st_mtime_ns for path in done}, "nothing was done twice"
    again = json.loads((tmp_path / "out" / "depth.json").read_text())["studies"]["depth"]
    assert again == json.loads((whole[0] / "results.json").read_text())["studies"]["depth"]


def test_an_exception_of_a_worker_ends_the_run(tmp_path, small):
    images = tiny_studies.few_images()
    context = tasks.Context(tiny_studies.TINY, images, store.Store(tmp_path))
    with pytest.raises(TypeError):
        tasks.run(context, [tasks.Task("wrong", len, ())], 2, lambda *step: None)


def test_a_worker_that_dies_is_told(tmp_path):
    context = tasks.Context(tiny_studies.TINY, tiny_studies.few_images(), store.Store(tmp_path))
    with pytest.raises(OSError, match=r"worker was ended from outside.*fewer --workers than 2"):
        tasks.run(context, [tasks.Task("dies", tiny_studies.die)], 2, lambda *step: None)


def test_progress_tells_every_task_in_order(tmp_path):
    told = []
    context = tasks.Context(tiny_studies.TINY, tiny_studies.few_images(), store.Store(tmp_path))
    work = [tasks.Task(name, lambda context: {}, after=after) for name, after in (("late", 1), ("early", 0))]
    tasks.run(context, work, 1, lambda *step: told.append(step))
    assert told == [("early", 0, 2), ("late", 1, 2)]
