"""The command line, as a person meets it."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from fusedres.cli import app

run = CliRunner().invoke


def test_explain_shows_every_block():
    result = run(app, ["explain", "fusedres:resnet18", "--recipe", "separate"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    assert "matched 9 of 9 blocks" in result.output and "layer4.1" in result.output


def test_explain_prints_json():
    result = run(app, ["explain", "fusedres:cifar_resnet29", "--recipe", "gram", "--json"])
    data = json.loads(result.output)
    assert data["matched"] == data["total"] == 10
    assert {block["recipe"] for block in data["blocks"]} == {"gram"}


def test_bad_names_are_explained():
    for arguments, message in (
        (["explain", "resnet50"], "fusedres:resnet50"),
        (["explain", "fusedres:resnet51"], "choose from"),
        (["explain", "fusedres:resnet18", "--recipe", "fast"], "unknown"),
    ):
        result = run(app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 2 and message in result.output
