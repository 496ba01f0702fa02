"""The command line: `fusedres demo`, `doctor`, `explain MODEL`, `tune MODEL`. Needs the extra `fusedres[demo]`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fusedres import doctor as examination
from fusedres import errors, models, patching, tune_command
from fusedres.patching.report import COLUMNS, PatchReport

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Fused residual blocks for PyTorch ResNets."
)
console = Console()
PREFIX = "fusedres:"


def model_by_name(name: str) -> models.ResNet | models.CifarResNet:
    """The model that `fusedres:NAME` names. Raises typer.BadParameter."""
    if not name.startswith(PREFIX):
        raise typer.BadParameter(
            f"{name!r} is no known model: write {PREFIX}NAME, for example {PREFIX}resnet50"
        )
    try:
        return models.create(name.removeprefix(PREFIX))  # type: ignore[return-value]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def report_table(report: PatchReport, title: str) -> Table:
    table = Table(
        *COLUMNS, title=title, caption=f"matched {len(report.matched)} of {len(report.blocks)} blocks"
    )
    for block in report.blocks:
        table.add_row(*block.row)
    return table


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="fusedres:NAME, for example fusedres:resnet50")],
    recipe: Annotated[str, typer.Option(help="the recipe to ask for")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """What patch does to a model: its residual blocks, matched or not, and why; which backend serves each op here."""
    network = model_by_name(model)
    try:
        patching.patch(network, recipe=recipe, dry_run=True)
    except (ValueError, errors.FusedresError) as error:
        raise typer.BadParameter(str(error)) from error
    report = patching.report(network)
    serving, recipes = examination.serving(), examination.recipe_table()
    if as_json:
        typer.echo(json.dumps({**report.as_dict(), "serving": serving, "recipe_table": recipes}, indent=2))
    else:
        console.print(report_table(report, model))
        console.print(examination.recipe_table_table(recipes))
        console.print(examination.serving_table(serving))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="folder for curves.png and results.json")] = Path(
        "demo-output"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="passes over the training images")] = 8,
) -> None:
    """Trains two ResNets on handwritten digits, each unpatched and patched, and compares the runs."""
    from fusedres.demo.main import run_demo

    run_demo(output, epochs, console)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """What this installation is and does on this machine, with a numeric self-test of every op.

    Exit code 1 if the self-test finds a wrong result.
    """
    try:
        found = examination.examine()
    except errors.BackendUnavailableError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for table in examination.tables(found):
            console.print(table)
        for line in found["advice"]:
            typer.echo(line)
        typer.echo("the self-test passed" if found["passed"] else "the self-test FAILED")
    raise typer.Exit(0 if found["passed"] else 1)


tune_command.register(app, model_by_name, console)


def main() -> None:
    app()
