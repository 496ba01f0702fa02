"""The command line: `fusedres demo`, `study`, `doctor`, and explain, verify, compare, tune of a MODEL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from fusedres import errors
from fusedres.blocks import RECIPES
from fusedres.cli import devices, model_names, progress
from fusedres.cli import doctor as examination
from fusedres.cli import explain as explain_command
from fusedres.cli import tune as tune_command
from fusedres.measuring import compare as comparison
from fusedres.measuring import verify as verification

app = typer.Typer(no_args_is_help=True, add_completion=False)

MODEL_HELP = "fusedres:NAME, hf:NAME, torchvision:NAME or timm:NAME, for example hf:resnet-50"
NOTHING_COMPARED = 3  # exit code of verify
DEMO_LIBRARIES = ("matplotlib", "rich", "sklearn")
STUDY_LIBRARIES = ("jinja2", "matplotlib", "rich", "scipy", "sklearn", "threadpoolctl")
ModelName = Annotated[str, typer.Argument(help=MODEL_HELP)]
Recipe = Annotated[str, typer.Option(help="the recipe to ask for")]
Batch = Annotated[int, typer.Option(min=1, help="images")]
Size = Annotated[int, typer.Option(min=0, help="height and width of the images; 0: 32 for CIFAR, else 224")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto: a GPU if there is one")]


@contextmanager
def needing(command: str, libraries: tuple[str, ...]) -> Iterator[None]:
    """A library of a command's extra that is not installed, as one line and exit code 1."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in libraries:
            raise
        extra = f"pip install 'fusedres[{command}]'"
        typer.echo(f"fusedres {command} needs {missing}, which is not installed: {extra}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def explained() -> Iterator[None]:
    """What the package refuses, as one line and the exit code of wrong usage.

    Not typer's BadParameter, which draws a box around it: a command in a message could not be copied out of that.
    """
    try:
        yield
    except (ValueError, OSError, errors.FusedresError) as error:
        said = str(error)
        typer.echo(said if said.startswith("fusedres") else f"fusedres: {said}", err=True)
        raise typer.Exit(2) from error


def prepared(model: str, batch: int, size: int, device: str) -> tuple[nn.Module, torch.Tensor]:
    """The model of that name and its example [batch, 3, size, size], channels_last, on the device."""
    where = devices.find(device)
    images = model_names.images(batch, size or model_names.image_size(model))
    return devices.put(model_names.build(model), images, where)


def show(result: verification.VerifyReport | comparison.Comparison, as_json: bool) -> None:
    typer.echo(json.dumps(result.as_dict(), indent=2) if as_json else str(result))


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fusedres {version('fusedres')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Fused residual blocks for PyTorch ResNets."""


@app.command()
def explain(
    model: ModelName,
    recipe: Recipe = "auto",
    batch: Annotated[
        int, typer.Option(min=0, help="run that many images, and say what each block ran as")
    ] = 0,
    size: Size = 0,
    device: Device = "auto",
    ops: Annotated[bool, typer.Option("--ops", help="also print which backend serves each op")] = False,
    accuracy: Annotated[str, typer.Option(help="fast, or strict: no algorithm with more error")] = "fast",
    as_json: AsJson = False,
) -> None:
    """What patch does to a model: its residual blocks, matched or not, and why; with --batch what each runs as."""
    with explained():
        network, images = prepared(model, batch, size, device)
        title = explain_command.title(model, network, images)
        report = explain_command.dry_report(network, recipe, accuracy)
        calls = explain_command.call(network, images, recipe, accuracy) if batch else {}
        convolutions = explain_command.convolutions(accuracy)
        serving, recipes = examination.serving() if ops or as_json else [], examination.recipe_table()
    if as_json:
        ran = {phase: found.as_dict()["blocks"] for phase, found in calls.items()}
        found = {
            "title": title,
            **report.as_dict(),
            "calls": ran,
            "serving": serving,
            "recipe_table": recipes,
            "convolutions": convolutions,
        }
        typer.echo(json.dumps(found, indent=2))
        return
    parts = [explain_command.text(title, report, calls, convolutions), examination.recipe_table_text(recipes)]
    typer.echo("\n\n".join([*parts, *([examination.serving_text(serving)] if ops else [])]))


@app.command()
def verify(
    model: ModelName,
    recipe: Annotated[list[str], typer.Option(help="a recipe to check; all by default")] = [],  # noqa: B006
    batch: Batch = 2,
    size: Annotated[int, typer.Option(min=1, help="height and width of the images")] = 64,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compares outputs, gradients and running statistics, patched and unpatched.

    Exit code 0: they agree; 1: they differ; 2: wrong usage; 3: nothing was compared, for no block ran fused.
    """
    with explained(), progress.shown("verify") as told:
        network, images = prepared(model, batch, size, device)
        result = verification.verify(network, images, recipes=tuple(recipe) or tuple(RECIPES), progress=told)
    show(result, as_json)
    if all(check.passed for check in result.checks):
        raise typer.Exit(NOTHING_COMPARED if result.nothing_ran_fused else 0)
    raise typer.Exit(1)


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
    with explained(), progress.shown("compare") as told:
        network, images = prepared(model, batch, size, device)
        result = comparison.compare(network, images, recipe=recipe, rounds=rounds, progress=told)
    show(result, as_json)


@app.command()
def tune(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    batch: Batch = 32,
    size: Size = 0,
    dtype: Annotated[str, typer.Option(help="float32, or autocast to bfloat16 or float16")] = "float32",
    device: Device = "auto",
    evaluation: Annotated[bool, typer.Option("--eval", help="inference instead of training")] = False,
    backend: Annotated[str, typer.Option(help="as for fusedres.patch")] = "auto",
    rounds: Annotated[int, typer.Option(help="interleaved rounds a class of block, at least 5")] = 9,
    show: Annotated[bool, typer.Option("--show", help="instead: print the table that is kept")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="instead: remove the table that is kept")] = False,
    as_json: AsJson = False,
) -> None:
    """Measures which recipe is fastest for each block on this machine, and keeps it for recipe "auto".

    `fusedres tune MODEL` measures, `fusedres tune --show` prints what is kept, `fusedres tune --clear` removes it.
    """
    if (model is not None) + show + clear != 1:
        raise typer.BadParameter("give one of MODEL, --show and --clear")
    with explained():
        if show:
            typer.echo(tune_command.shown_table(as_json))
            return
        if clear:
            tune_command.clear_table(typer.echo)
            return
    assert model is not None
    with explained(), progress.shown("tune") as told:
        network, images = prepared(model, batch, size, device)
        network.train(not evaluation)
        found = tune_command.measure_and_keep(
            model,
            network,
            images,
            dtype=dtype,
            backend=backend,
            rounds=rounds,
            as_json=as_json,
            progress=told,
        )
    typer.echo(found)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="folder for the pictures and results.json")] = Path(
        "demo-output"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="passes over the training images")] = 5,
    speed: Annotated[bool, typer.Option(help="time ResNet-50 and ResNet-18 at full size too")] = True,
    device: Device = "auto",
) -> None:
    """Trains two ResNets on handwritten digits, each unpatched and patched, and compares the runs; then times larger
    ones on the device, unpatched and patched by default.
    """
    with needing("demo", DEMO_LIBRARIES):
        from fusedres.cli.demo.main import run_demo
    with explained():
        where = devices.find(device)
        with progress.shown("demo") as told:
            run_demo(output, epochs, speed, where, told)


@app.command()
def study(
    name: Annotated[str, typer.Argument(metavar="STUDY", help="gradients, depth, exits, landscape or all")],
    output: Annotated[
        Path, typer.Option(help="folder for pictures, results and what is needed to go on")
    ] = Path("study-output"),
    quick: Annotated[bool, typer.Option("--quick", help="fewer depths, steps and points")] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="a folder with one sub-folder of images a class, instead of the digits"),
    ] = None,
    size: Annotated[int, typer.Option(min=8, help="height and width that images of --data are given")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="the first seed")] = 0,
    seeds: Annotated[int, typer.Option(min=2, help="how many seeds")] = 3,
    workers: Annotated[int, typer.Option(min=0, help="processes; 0: one a core")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measures why residual blocks work, in four studies: gradients, depth, exits and the loss surface.

    A run that was stopped goes on where it was when the same command is given again.
    """
    with needing("study", STUDY_LIBRARIES):
        from fusedres.cli.study import data as pictures
        from fusedres.cli.study import main as studies
        from fusedres.cli.study import settings
    with explained(), progress.shown(f"study {name}") as told:
        studies.chosen(name)
        images = pictures.digits() if data is None else pictures.folder(data, size)
        sizes = (settings.quick if quick else settings.full)(tuple(range(seed, seed + seeds)))
        found = studies.run_study(name, output, sizes, images, workers or studies.tasks.cores(), told)
    typer.echo(json.dumps(found, indent=2) if as_json else studies.shown_text(found, output))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this installation is and does on this machine, with a numeric self-test of every op.

    Exit code 1 if the self-test finds a wrong result.
    """
    raise typer.Exit(examination.run(as_json))
