"""`fusedres tune MODEL`: measures the recipes on this machine and writes the user table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from fusedres.blocks import user_table
from fusedres.tuning import Tuned, tune

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tuned_table(found: list[Tuned], title: str) -> Table:
    """One row a recipe and class of block; times as fast as the original forward, with the 95 % interval."""
    table = Table("blocks", "call", "recipe", "ms", "times as fast", "", title=title)
    for tuned in found:
        blocks = ", ".join(tuned.blocks)
        for t in sorted(tuned.timings, key=lambda t: t.seconds):
            ratio = f"{t.ratio:.2f} [{t.low:.2f} {t.high:.2f}]"
            taken = "taken" if t.recipe == tuned.entry.recipe else ""
            table.add_row(blocks, tuned.key.call, t.recipe, f"{t.seconds * 1e3:.2f}", ratio, taken)
        for recipe, reason in tuned.rejected.items():
            table.add_row(blocks, tuned.key.call, recipe, "", reason, "")
    return table


def register(app: typer.Typer, model_by_name: Callable[[str], nn.Module], console: Console) -> None:
    """Adds the command to the application."""

    @app.command("tune")
    def tune_command(
        model: Annotated[str, typer.Argument(help="fusedres:NAME, for example fusedres:resnet50")],
        batch: Annotated[int, typer.Option(min=1, help="images a step")] = 32,
        size: Annotated[
            int, typer.Option(help="height and width of an image; 0: 32 for CIFAR, else 224")
        ] = 0,
        dtype: Annotated[str, typer.Option(help="float32, or autocast to bfloat16 or float16")] = "float32",
        device: Annotated[str, typer.Option(help="cpu or cuda; auto: a GPU if there is one")] = "auto",
        evaluation: Annotated[bool, typer.Option("--eval", help="inference instead of training")] = False,
        backend: Annotated[str, typer.Option(help="as for fusedres.patch")] = "auto",
        rounds: Annotated[int, typer.Option(min=3, help="interleaved rounds a class of block")] = 9,
    ) -> None:
        """Measures which recipe is fastest for each block on this machine, and keeps it for recipe "auto"."""
        if dtype not in DTYPES:
            raise typer.BadParameter(f"--dtype {dtype!r} is unknown, choose from {', '.join(DTYPES)}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        side = size or (32 if "cifar" in model else 224)
        network = model_by_name(model).to(device).train(not evaluation)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
        low = dtype != "float32"
        with torch.autocast(device, DTYPES[dtype]) if low else nullcontext():
            found = tune(
                network,
                x,
                gradients=not evaluation,
                backend=backend,
                rounds=rounds,
                progress=lambda name: console.print(f"measuring {name}"),
            )
        title = f"{model}, {batch} x 3 x {side} x {side}, {dtype}, {user_table.device_name(x.device)}"
        console.print(tuned_table(found, title))
        where = user_table.write({tuned.key: tuned.entry for tuned in found})
        console.print(f"{len(found)} classes of block, kept in {where}")
