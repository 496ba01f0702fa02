"""The command line: `fusedres demo`, `doctor`, and explain, verify, compare, tune of a MODEL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from fusedres import errors
from fusedres.blocks import RECIPES
from fusedres.cli import doctor as examination
from fusedres.cli import explain as explain_command
from fusedres.cli import model_names
from fusedres.cli import tune as tune_command
from fusedres.measuring import compare as comparison
from fusedres.measuring import verify as verification

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Fused residual blocks for PyTorch ResNets."
)

MODEL_HELP = "fusedres:NAME, hf:NAME, torchvision:NAME or timm:NAME, for example hf:resnet-50"
DEMO_LIBRARIES = ("matplotlib", "rich", "sklearn")
ModelName = Annotated[str, typer.Argument(help=MODEL_HELP)]
Recipe = Annotated[str, typer.Option(help="the recipe to ask for")]
Batch = Annotated[int, typer.Option(min=1, help="images")]
Size = Annotated[int, typer.Option(min=0, help="height and width of the images; 0: 32 for CIFAR, else 224")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Device = Annotated[str, typer.Option(help="cpu or cuda; auto: a GPU if there is one")]


@contextmanager
def explained() -> Iterator[None]:
    """What the package refuses, as an error of the command line."""
    try:
        yield
    except (ValueError, OSError, errors.FusedresError) as error:
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


def show(result: verification.VerifyReport | comparison.Comparison, as_json: bool) -> None:
    typer.echo(json.dumps(result.as_dict(), indent=2) if as_json else str(result))


@app.command()
def explain(
    model: ModelName,
    recipe: Recipe = "auto",
    batch: Annotated[
        int, typer.Option(min=0, help="run that many images, and say what each block ran as")
    ] = 0,
    size: Size = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """What patch does to a model: its residual blocks, matched or not, and why; with --batch what each runs as."""
    size = size or model_names.image_size(model)
    with explained():
        network = model_names.build(model)
        report = explain_command.dry_report(network, recipe)
        calls = explain_command.call(*on_device(network, device, batch, size), recipe) if batch else {}
        serving, recipes = examination.serving(), examination.recipe_table()
    if as_json:
        ran = {phase: found.as_dict()["blocks"] for phase, found in calls.items()}
        found = {**report.as_dict(), "calls": ran, "serving": serving, "recipe_table": recipes}
        typer.echo(json.dumps(found, indent=2))
        return
    title = f"{model}, {batch} x 3 x {size} x {size}" if batch else model
    parts = [explain_command.text(title, report, calls)]
    parts += [examination.recipe_table_text(recipes), examination.serving_text(serving)]
    typer.echo("\n\n".join(parts))


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
    with explained():
        network, images = on_device(model_names.build(model), device, batch, size)
        result = verification.verify(network, images, recipes=tuple(recipe) or tuple(RECIPES))
    show(result, as_json)
    raise typer.Exit(0 if result else 1)


@app.command()
def compare(
    model: ModelName,
    recipe: Recipe = "auto",
    batch: Batch = 8,
    size: Size = 0,
    rounds: Annotated[int, typer.Option(min=2, help="timed steps of each")] = 15,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Times the patched model against the unpatched one, in turns, once both compute the same."""
    with explained():
        size = size or model_names.image_size(model)
        network, images = on_device(model_names.build(model), device, batch, size)
        result = comparison.compare(network, images, recipe=recipe, rounds=rounds)
    show(result, as_json)


@app.command()
def tune(
    model: ModelName,
    batch: Batch = 32,
    size: Size = 0,
    dtype: Annotated[str, typer.Option(help="float32, or autocast to bfloat16 or float16")] = "float32",
    device: Device = "auto",
    evaluation: Annotated[bool, typer.Option("--eval", help="inference instead of training")] = False,
    backend: Annotated[str, typer.Option(help="as for fusedres.patch")] = "auto",
    rounds: Annotated[int, typer.Option(min=3, help="interleaved rounds a class of block")] = 9,
) -> None:
    """Measures which recipe is fastest for each block on this machine, and keeps it for recipe "auto"."""
    with explained():
        size = size or model_names.image_size(model)
        network, images = on_device(model_names.build(model), device, batch, size)
        network.train(not evaluation)
        tune_command.measure_and_keep(
            model, network, images, dtype=dtype, backend=backend, rounds=rounds, say=typer.echo
        )


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="folder for curves.png and results.json")] = Path(
        "demo-output"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="passes over the training images")] = 8,
) -> None:
    """Trains two ResNets on handwritten digits, each unpatched and patched, and compares the runs."""
    try:
        from fusedres.cli.demo.main import run_demo
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in DEMO_LIBRARIES:
            raise
        typer.echo(
            f"fusedres demo needs {missing}, which is not installed: pip install 'fusedres[demo]'",
            err=True,
        )
        raise typer.Exit(1) from error
    run_demo(output, epochs)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this installation is and does on this machine, with a numeric self-test of every op.

    Exit code 1 if the self-test finds a wrong result.
    """
    raise typer.Exit(examination.run(as_json))
