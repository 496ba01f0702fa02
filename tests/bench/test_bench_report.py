"""The GPU report end to end on the CPU, and what it promises: written at once, resumed, nothing hidden."""

import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import report
import torch
from stages import correctness
from stages.ops import library_product

from fusedres.ops.backend import Backend
from fusedres.ops.cases import SMALL, cases
from fusedres.ops.contract import BnScaleShift
from fusedres.ops.reference import REFERENCE

ROOT = Path(__file__).resolve().parents[2]
MAY_BE_MISSING = {"cuda", "sm_90", "nvcc", "nvidia-smi", "ncu", "compute-sanitizer", "module:triton"}


def run_stages(stages, output):
    command = [
        str(ROOT / "bench/gpu_report.sh"),
        "--output",
        str(output),
        *stages,
        "--device",
        "cpu",
        "--size",
        "small",
    ]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_every_stage_runs_on_the_cpu(tmp_path):
    halves = report.STAGES[::2], report.STAGES[1::2]
    with ThreadPoolExecutor(len(halves)) as pool:
        for done in pool.map(run_stages, halves, [tmp_path] * len(halves)):
            assert done.returncode == 0, done.stdout + done.stderr
    assert {path.stem for path in tmp_path.iterdir()} == set(report.STAGES)
    for stage in report.STAGES:
        cells = json.loads((tmp_path / f"{stage}.json").read_text())["cells"]
        statuses = {name: cell["status"] for name, cell in cells.items()}
        assert report.MEASURED in statuses.values(), stage
        assert set(statuses.values()) <= {report.MEASURED, report.SKIPPED}, statuses
        for cell in cells.values():
            assert set(cell.get("needs", ())) <= MAY_BE_MISSING


@pytest.mark.parametrize("stage", report.STAGES)
@pytest.mark.parametrize("full", [False, True])
def test_cells_are_listed_without_a_gpu_and_named_once(stage, full, tmp_path):
    settings = report.Settings(torch.device("cuda"), full, tmp_path)
    names = [cell.name for cell in importlib.import_module(f"stages.{stage}").cells(settings)]
    assert names
    assert len(names) == len(set(names))


@pytest.fixture
def settings(tmp_path):
    return report.Settings(torch.device("cpu"), False, tmp_path)


@pytest.fixture
def run(settings, monkeypatch):
    """Runs a stage made of these cells; returns what run_stage does and the cells written."""

    def run_cells(*cells, deadline=float("inf")):
        stage = SimpleNamespace(cells=lambda _: list(cells))
        monkeypatch.setitem(sys.modules, "stages.invented", stage)
        counts = report.run_stage("invented", settings, "", deadline)
        path = settings.output / "invented.json"
        return counts, json.loads(path.read_text())["cells"] if path.exists() else {}

    return run_cells


def test_a_failure_is_kept_and_counted_and_run_again(run):
    def fail():
        raise RuntimeError("planted")

    good = report.Cell("good", lambda: {"value": 1})
    counts, cells = run(report.Cell("bad", fail), good)
    assert counts == (1, 0)
    assert cells["bad"]["status"] == report.FAILED
    assert "planted" in cells["bad"]["error"]
    assert cells["good"]["result"] == {"value": 1}
    counts, cells = run(report.Cell("bad", lambda: {"value": 2}), report.Cell("good", fail))
    assert counts == (0, 0)
    assert cells["bad"]["result"] == {"value": 2}
    assert cells["good"]["result"] == {"value": 1}


def test_after_a_lost_device_the_rest_is_left_to_a_new_process(run, settings, monkeypatch):
    def fail():
        raise RuntimeError("planted")

    ran = []
    bad, good = report.Cell("bad", fail), report.Cell("good", lambda: ran.append(1) or {})
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(report, "usable", lambda device: False)
        run(bad, good)
    assert stopped.value.code == report.DEVICE_LOST and not ran
    assert report.Results("invented", settings).status("bad") == report.FAILED
    counts, _ = run(bad, good)
    assert counts == (1, 0) and ran, "the failed cell comes last"


FAKE_REPORT = """#!/usr/bin/env bash
# stands for python: says what it was asked for, loses the device once, takes a second
[[ " $* " == *" -c "* ]] && exit 0
echo "$@" >> "$LOG"
sleep 1
[[ "$*" == *probes* && $(grep -c probes "$LOG") == 1 ]] && exit 3
exit 0
"""


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["--help"], 0, ""),
        (["probes", "--output"], 2, "--output needs a value"),
        (["--only"], 2, "--only needs"),
    ],
    ids=str,
)
def test_usage(arguments, code, problem):
    script = ROOT / "bench/gpu_report.sh"
    done = subprocess.run([str(script), *arguments], capture_output=True, text=True, timeout=60)
    usage = done.stderr if code else done.stdout
    assert (
        done.returncode == code
        and problem in usage
        and "[--output DIR] [--budget SECONDS] [STAGE...]" in usage
    )
    assert usage.endswith("beside DIR never.\n"), "nothing of the program itself"


def test_stages_share_a_total_and_go_on_after_a_lost_device(tmp_path):
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE_REPORT)
    python.chmod(0o755)
    command = [str(ROOT / "bench/gpu_report.sh"), "--budget", "300", "--output", str(tmp_path), "all"]
    environment = {**os.environ, "PYTHON": str(python), "LOG": str(log)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, "a device was lost"
    calls = [line.split() for line in log.read_text().splitlines()]
    names = [next(word for word in call if word in report.STAGES) for call in calls]
    assert names == ["environment", "baselines", "probes", "probes", *report.STAGES[3:]]
    given = {name: int(call[call.index("--seconds") + 1]) for name, call in zip(names, calls, strict=True)}
    assert given["correctness"] > 3 * given["baselines"] > 0
    assert given["models"] > given["ops"], "what the others leave goes to the last"


def test_without_stages_it_is_the_short_report(tmp_path):
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE_REPORT)
    python.chmod(0o755)
    command = [str(ROOT / "bench/gpu_report.sh"), "--size", "small", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHON": str(python), "LOG": str(log)}
    for more, budget in (([], range(880, 901)), (["--budget", "60"], range(40, 61))):
        log.unlink(missing_ok=True)
        assert subprocess.run([*command, *more], env=environment, timeout=60).returncode == 0
        script, *given = log.read_text().replace(str(ROOT), "").split()  # which may have a space
        assert script == "/bench/short_report.py"
        assert given[:3] == ["--output", str(tmp_path), "--budget"]
        assert int(given[3]) in budget and given[4:] == ["--size", "small"]


def test_a_cell_that_takes_too_long_ends_the_process(run, settings, monkeypatch):
    """It is written down as failed before the process goes: nothing else stops a kernel that never ends."""
    ended, waits = [], Event()
    monkeypatch.setattr(report, "end_process", lambda: (ended.append(1), waits.set()))
    slow = report.Cell("slow", lambda: waits.wait(60) and {})
    stage = SimpleNamespace(cells=lambda _: [slow])
    monkeypatch.setitem(sys.modules, "stages.invented", stage)
    seen = []
    monkeypatch.setattr(
        report.Results, "write", lambda self, name, status, **found: seen.append((name, status, found))
    )
    report.run_stage("invented", settings, "", float("inf"), cell_seconds=0.05)
    assert ended and seen[1][:2] == ("slow", report.FAILED) and "cut after" in seen[1][2]["error"]


def test_a_cell_within_its_time_is_left_alone(run, settings, monkeypatch):
    ended = []
    monkeypatch.setattr(report, "end_process", lambda: ended.append(1))
    quick = SimpleNamespace(cells=lambda _: [report.Cell("quick", dict)])
    monkeypatch.setitem(sys.modules, "stages.invented", quick)
    report.run_stage("invented", settings, "", float("inf"), cell_seconds=0.5)
    time.sleep(0.6)  # past the 0.5 that it was given
    assert not ended and report.Results("invented", settings).status("quick") == report.MEASURED


def test_a_number_that_json_cannot_hold_is_a_failure(run):
    counts, cells = run(report.Cell("bad", lambda: {"value": float("nan")}))
    assert counts == (1, 0)
    assert cells["bad"]["status"] == report.FAILED


def test_results_are_on_disk_while_a_cell_runs(run, settings):
    seen = {}

    def look():
        seen.update(json.loads((settings.output / "invented.json").read_text())["cells"])
        return {}

    run(report.Cell("first", lambda: {"value": 1}), report.Cell("second", look))
    assert seen["first"]["result"] == {"value": 1}
    assert seen["second"]["status"] == report.RUNNING


def test_a_cell_that_cut_the_run_comes_last(run, settings):
    report.Results("invented", settings).write("hangs", report.RUNNING)
    order = []
    run(*(report.Cell(name, lambda name=name: order.append(name) or {}) for name in ("hangs", "other")))
    assert order == ["other", "hangs"]


def test_nothing_starts_after_the_deadline(run):
    counts, cells = run(report.Cell("late", dict), deadline=time.monotonic() - 1)
    assert counts == (0, 1)
    assert not cells


def test_another_machines_result_is_measured_again(run, settings):
    results = report.Results("invented", settings)
    results.machine = "another"
    results.write("cell", report.MEASURED, result={"value": 1})
    _, cells = run(report.Cell("cell", lambda: {"value": 2}))
    assert cells["cell"]["result"] == {"value": 2}


def test_accuracy_names_what_is_wrong(settings, monkeypatch):
    """And counts what passed, and what a backend leaves to another, beside it."""
    scale_shift = REFERENCE.functions[BnScaleShift]
    good = Backend("good", {BnScaleShift: scale_shift})
    bad = Backend("bad", {BnScaleShift: lambda op: tuple(t * 1.01 for t in scale_shift(op))})
    planted = {"good": lambda: good, "reference": lambda: REFERENCE}
    monkeypatch.setattr(correctness, "LOADERS", planted)
    found = correctness.accuracy(settings, "float32")
    assert found["passed"] == len(SMALL) and found["unserved"].keys() == {"good: no_kernel"}
    monkeypatch.setitem(planted, "bad", lambda: bad)
    with pytest.raises(AssertionError, match=r"bad bn_scale_shift Shape\(batch=2.*has error") as raised:
        correctness.accuracy(settings, "float32")
    assert "good" not in str(raised.value)


def test_a_missing_program_is_named(run):
    counts, cells = run(report.Cell("cell", dict, ("no-such-program",)))
    assert counts == (0, 0)
    assert cells["cell"] == {**cells["cell"], "status": report.SKIPPED, "needs": ["no-such-program"]}


def test_an_unknown_stage_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", "nonsense"])
    with pytest.raises(SystemExit):
        report.main()
    assert "choose from environment" in capsys.readouterr().err


def test_products_are_measured_beside_the_bare_one():
    """By the library, of the sizes of the fused one."""
    shape, found = SMALL[0], {}
    for case in cases(shape, torch.float32, torch.device("cpu")):
        product = library_product(case.op)
        if product is not None:
            found[case.name] = tuple(product().shape)
    narrow, wide = (
        (shape.batch, channels, shape.side, shape.side) for channels in (shape.narrow, shape.wide)
    )
    assert found == {
        "conv1x1_forward/stats": narrow,
        "conv1x1_forward/join": wide,
        "conv1x1_forward/inference": wide,
        "gram": (shape.narrow, shape.narrow),
        "conv1x1_backward_weight": (shape.wide, shape.narrow, 1, 1),
        "conv1x1_gram_backward_input": narrow,
        "conv1x1_backward_input": wide,
    }
