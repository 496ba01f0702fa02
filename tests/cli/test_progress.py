"""Progress: a bar on a terminal, spaced lines in a log, all on stderr."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fusedres.cli import progress
from fusedres.cli.app import app

ARGUMENTS = ["fusedres:cifar_resnet20", "--size", "8", "--batch", "2", "--recipe", "separate", "--json"]


def test_steps_are_passed_on_at_most_once_in_a_while():
    now, passed_on = [0.0], []
    told = progress.Spaced(lambda *step: passed_on.append(step), 5.0, clock=lambda: now[0])
    for done in range(12):
        now[0] = done * 2.0
        told("timing", done, 12)
    assert passed_on == [("timing", done, 12) for done in (3, 6, 9)]


def test_a_line_of_a_log_is_one_line(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_APART", 0.0)
    written = io.StringIO()
    told = progress.log("compare", Console(file=written, width=20))
    told("timing [a step] of a long name", 3, 15)
    assert written.getvalue() == "compare: timing [a step] of a long name, 3 of 15, 0 s\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", *ARGUMENTS, "--rounds", "2"], "compare: timing inference, 2 of 2, "),
        (["verify", *ARGUMENTS], "verify: checking, 3 of 4, "),
    ],
)
def test_a_log_has_lines_on_stderr_and_json_alone_on_stdout(monkeypatch, arguments, said):
    monkeypatch.setattr(progress, "SECONDS_APART", 0.0)
    result = CliRunner().invoke(app, arguments)
    assert said in result.stderr
    assert json.loads(result.stdout)


def test_a_terminal_has_a_bar():
    ours, theirs = pty.openpty()
    program = (
        "from fusedres.cli import progress\n"
        "progress.REFRESH_APART = 0.0\n"
        "with progress.shown('compare') as told:\n"
        "    told('timing training', 3, 15)\n"
        "print('done')\n"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, check=True)
    os.close(theirs)
    drawn = os.read(ours, 100_000).decode()
    os.close(ours)
    assert ran.stdout == b"done\n" and "━" in drawn
    assert "compare: timing training" in drawn and "3/15" in drawn
