"""The command line: `fusedres demo`, `doctor`, and explain, verify, compare, tune of a MODEL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from fusedres import doctor as examination
from fusedres import errors, model_names, patching, tune_command
from fusedres.blocks import RECIPES
from fusedres.patching.report import COLUMNS, PatchReport

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Fused residual blocks for PyTorch ResNets."
)
console = Console()

MODEL_HELP = "fusedres:NAME, hf:NAME, torchvision:NAME or timm:NAME, for example hf:resnet-50"
ModelName = Annotated[str, typer.Argument(help=MODEL_HELP)]
Recipe = Annotated[str, typer.Option(help="the recipe to ask for")]
Batch = Annotated[int, typer.Option(min=1, help="images")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Device = Annotated[str, typer.Option(help="cpu or cuda; auto: a GPU if there is one")]


def model_by_name(name: str) -> nn.Module:
    """The model of that name. Raises typer.BadParameter."""
    try:
        return model_names.build(name)
    except model_names.ModelNameError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def explained() -> Iterator[None]:
    """What the package refuses, as an error of the command line."""
    try:
        yield
    except (ValueError, errors.FusedresError) as error:
        raise typer.BadParameter(str(error)) from error


def on_device(network: nn.Module, device: str, batch: int, size: int) -> tuple[nn.Module, torch.Tensor]:
    """The model and its example [batch, 3, size, size], channels_last, on the device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    images = model_names.images(batch, size)
    try:
        network.to(device)
        images = images.to(device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"device {device!r}: {error}") from error
    channels_last = torch.channels_last
    return network.to(memory_format=channels_last), images.to(memory_format=channels_last)  # type: ignore[call-overload]


def show(result: patching.VerifyReport | patching.Comparison, as_json: bool) -> None:
    typer.echo(json.dumps(result.as_dict(), indent=2) if as_json else str(result))


def report_table(report: PatchReport, title: str) -> Table:
    table = Table(
        *COLUMNS, title=title, caption=f"matched {len(report.matched)} of {len(report.blocks)} blocks"
    )
    for block in report.blocks:
        table.add_row(*block.row)
    return table


@app.command()
def explain(model: ModelName, recipe: Recipe = "auto", as_json: AsJson = False) -> None:
    """What patch does to a model: its residual blocks, matched or not, and why; which backend serves each op here."""
    network = model_by_name(model)
    with explained():
        patching.patch(network, recipe=recipe, dry_run=True)
    report = patching.report(network)
    serving, recipes = examination.serving(), examination.recipe_table()
    if as_json:
        typer.echo(json.dumps({**report.as_dict(), "serving": serving, "recipe_table": recipes}, indent=2))
    else:
        console.print(report_table(report, model))
        console.print(examination.recipe_table_table(recipes))
        console.print(examination.serving_table(serving))


@app.command()
def verify(
    model: ModelName,
    recipe: Annotated[list[str], typer.Option(help="a recipe to check; all by default")] = [],  # noqa: B006
    batch: Batch = 2,
    size: Annotated[int, typer.Option(min=1, help="height and width of the images")] = 64,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compares outputs, gradients and running statistics, patched and unpatched; fails if they differ."""
    network, images = on_device(model_by_name(model), device, batch, size)
    with explained():
        result = patching.verify(network, images, recipes=tuple(recipe) or tuple(RECIPES))
    show(result, as_json)
    raise typer.Exit(0 if result else 1)


@app.command()
def compare(
    model: ModelName,
    recipe: Recipe = "auto",
    batch: Batch = 8,
    size: Annotated[int, typer.Option(min=0, help="height and width of the images; 0: the model's own")] = 0,
    rounds: Annotated[int, typer.Option(min=2, help="timed steps of each")] = 15,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Times the patched model against the unpatched one, in turns, once both compute the same."""
    network, images = on_device(model_by_name(model), device, batch, size or model_names.image_size(model))
    with explained():
        result = patching.compare(network, images, recipe=recipe, rounds=rounds)
    show(result, as_json)


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
