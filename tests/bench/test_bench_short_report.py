"""The short report without a GPU: its order, its budget, and that one cell costs itself alone."""

from __future__ import annotations

import json
import re
import sys
import time
from types import SimpleNamespace

import pytest
import report
import short_report
import torch
from report import FAILED, MEASURED, RUNNING, SKIPPED, Cell, Results, Settings
from short_report import BUDGET, PLAN, Part, names_of, run_plan


@pytest.fixture
def settings(tmp_path):
    return Settings(torch.device("cpu"), False, tmp_path)


class Machine:
    """Runs `report.py`'s commands on a clock of its own: each cell takes `seconds` of it, and may fail or hang."""

    def __init__(self, settings, seconds=10.0, hangs=(), dies_after=()):
        self.settings, self.seconds, self.hangs, self.dies_after = settings, seconds, hangs, dies_after
        self.now, self.ran, self.processes = 0.0, [], 0

    def clock(self):
        return self.now

    def run(self, command, limit):
        self.processes += 1
        stage = command[2]
        given = dict(zip(command[3::2], command[4::2], strict=True))
        assert given["--output"] == str(self.settings.output) and given["--size"] == "small"
        end, results = self.now + limit, Results(stage, self.settings)
        names = [name for name in CELLS[stage] if re.search(given["--only"], name)]
        names.sort(key=lambda name: results.status(name) in (RUNNING, FAILED))
        for name in names:
            if self.now > end or results.status(name) == MEASURED:
                continue
            self.ran.append(f"{stage}/{name}")
            results.write(name, RUNNING)
            if name in self.hangs:  # cut from inside, or from outside with the whole part
                cell_seconds = float(given["--cell-seconds"])
                if self.now + cell_seconds < end:
                    results.write(name, FAILED, error="cut")
                self.now = min(end, self.now + cell_seconds)
                return
            self.now += self.seconds
            if self.now > end:
                self.now = end
                return
            results.write(name, MEASURED, result={})
            if name in self.dies_after:
                return


CELLS = {"first": ["a", "b", "c"], "second": ["d", "e"], "third": ["f", "g"]}
PARTS = (Part("1", "first", "[ab]", 60, 25), Part("2", "second", "", 60, 25), Part("3", "third", "", 60, 25))


@pytest.fixture(autouse=True)
def stages(monkeypatch):
    for stage, names in CELLS.items():
        cells = [Cell(name, dict) for name in names]
        monkeypatch.setitem(
            sys.modules, f"stages.{stage}", SimpleNamespace(cells=lambda _, cells=cells: cells)
        )


def run_on(machine, settings, budget=180.0):
    return run_plan(PARTS, settings, budget, machine.run, machine.clock)


def test_in_the_order_of_the_plan_one_process_a_part(settings):
    machine = Machine(settings)
    found = run_on(machine, settings)
    assert machine.ran == ["first/a", "first/b", "second/d", "second/e", "third/f", "third/g"]
    assert machine.processes == 3 and found == {MEASURED: machine.ran}
    again = Machine(settings)
    assert run_on(again, settings) == found
    assert not again.ran, "what is measured is not run again"


def test_cells_that_the_budget_has_no_room_for_are_skipped_by_name(settings):
    """Each part has its share, the last one too, and what it leaves undone is written down."""
    machine = Machine(settings)
    found = run_on(machine, settings, budget=33.0)
    assert found[MEASURED] == ["first/a", "second/d", "third/f"]
    written = json.loads((settings.output / "second.json").read_text())["cells"]["e"]
    assert written["status"] in (SKIPPED, FAILED) and machine.now <= 33.0
    nothing = Machine(Settings(settings.device, False, settings.output / "other"))
    found = run_on(nothing, nothing.settings, budget=5.0)
    assert not nothing.processes and len(found[SKIPPED]) == 6
    cell = json.loads((nothing.settings.output / "first.json").read_text())["cells"]["a"]
    assert cell["status"] == SKIPPED and cell["needs"] == ["time"]


def test_what_a_part_leaves_goes_to_the_next(settings):
    machine = Machine(settings, seconds=15.0)
    found = run_on(machine, settings, budget=90.0)
    assert found == {MEASURED: machine.ran} and machine.now == 90.0
    quick = Machine(Settings(settings.device, False, settings.output / "other"), seconds=1.0)
    limits = []
    run_plan(PARTS, quick.settings, 90.0, lambda c, s: (limits.append(s), quick.run(c, s)), quick.clock)
    assert limits == [30.0, 58.0, 86.0]


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_cell_that_hangs_costs_itself_alone(settings, name):
    machine = Machine(settings, hangs=name)
    found = run_on(machine, settings)
    assert found[FAILED] == [f"first/{name}"] and len(found[MEASURED]) == 5
    assert machine.ran.count(f"first/{name}") == 1


def test_a_process_that_is_cut_from_outside_leaves_a_failure(settings):
    machine = Machine(settings, hangs="b")
    found = run_on(machine, settings, budget=60.0)
    assert "first/b" in found[FAILED]
    cell = json.loads((settings.output / "first.json").read_text())["cells"]["b"]
    assert cell["error"].startswith("cut")


def test_after_a_lost_process_another_goes_on_behind(settings):
    machine = Machine(settings, dies_after="a")
    found = run_on(machine, settings)
    assert len(found[MEASURED]) == 6 and machine.processes == 4


def test_a_process_that_begins_no_cell_is_a_failure_and_not_tried_for_ever(settings):
    found = run_plan(PARTS, settings, 180.0, lambda command, seconds: None, lambda: 0.0)
    assert len(found[FAILED]) == 6


def test_nothing_that_was_started_outlives_its_time(tmp_path):
    """Neither the process nor what that started."""
    file = tmp_path / "beats"
    child = f"import time\nwhile True: open({str(file)!r}, 'a').write('.'); time.sleep(0.05)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    short_report.launch([sys.executable, "-c", parent], 3.0)
    assert 3.0 <= time.monotonic() - start < 10.0
    size = file.stat().st_size
    time.sleep(0.5)  # ten beats of one that were alive
    assert size == file.stat().st_size > 0


def test_the_plan_names_cells_that_there_are_and_fills_fifteen_minutes(tmp_path):
    full = Settings(torch.device("cuda"), True, tmp_path)
    names = {part.title: names_of(part, full) for part in PLAN}
    assert all(names.values()) and BUDGET == 900
    assert all(part.cell_seconds <= part.seconds for part in PLAN)
    step = "resnet50/train/bfloat16/256/"
    steps = [name.removeprefix(step) for found in names.values() for name in found if name.startswith(step)]
    assert steps == [
        *("eager_channels_last", "torch_compile", "torch_compile_graph"),
        *("fusedres_separate", "fusedres_gram"),
        *("eager_channels_last_graphed", "fusedres_separate_graphed", "fusedres_gram_graphed"),
        *("fusedres_separate_compile_graph", "fusedres_gram_compile_graph"),
    ]
    titles = list(names)
    assert titles[0].startswith("environment") and titles[-1].startswith("kernels against ceilings")
    assert names["accuracy of every op"] == ["accuracy/bfloat16"]


def test_a_part_on_the_cpu(settings, capsys):
    """With the real `report.py`, in its own process."""
    part = Part("versions", "environment", "^(versions|gpu)$", 60, 30)
    found = run_plan([part], settings, 120.0)
    assert found == {MEASURED: ["environment/versions"], SKIPPED: ["environment/gpu"]}
    cells = json.loads((settings.output / "environment.json").read_text())["cells"]
    assert cells["versions"]["result"]["torch"] == torch.__version__ and cells["gpu"]["needs"] == ["cuda"]
    assert report.Results("environment", settings).machine == cells["versions"]["machine"]
