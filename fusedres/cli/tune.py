"""`fusedres tune MODEL`: measures the recipes on this machine and writes the user table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fusedres.blocks import user_table
from fusedres.measuring.tune import Tuned, tune
from fusedres.text_table import section

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def text(found: list[Tuned], title: str) -> str:
    """One row a recipe and class of block; times as fast as the original forward, with the 95 % interval."""
    rows = [("call", "recipe", "ms", "times as fast", "", "blocks")]
    for tuned in found:
        blocks = ", ".join(tuned.blocks)
        for t in sorted(tuned.timings, key=lambda t: t.seconds):
            ratio = f"{t.ratio:.2f} [{t.low:.2f} {t.high:.2f}]"
            taken = "taken" if t.recipe == tuned.entry.recipe else ""
            rows.append((tuned.key.call, t.recipe, f"{t.seconds * 1e3:.2f}", ratio, taken, blocks))
        for recipe, reason in tuned.rejected.items():
            rows.append((tuned.key.call, recipe, "", reason, "", blocks))
    return section(title, rows)


def measure_and_keep(
    name: str,
    network: nn.Module,
    images: Tensor,
    *,
    dtype: str,
    backend: str,
    rounds: int,
    say: Callable[[str], None],
) -> None:
    """Measures the model in the mode that it is in, says what was found, and writes it into the user table.

    Raises:
        ValueError, OSError, FusedresError: the dtype is unknown, the model cannot be tuned, or no table written.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is unknown, choose from {', '.join(DTYPES)}")
    low = dtype != "float32"
    with torch.autocast(images.device.type, DTYPES[dtype]) if low else nullcontext():
        found = tune(
            network,
            images,
            gradients=network.training,
            backend=backend,
            rounds=rounds,
            progress=lambda block: say(f"measuring {block}"),
        )
    size = " x ".join(map(str, images.shape))
    say(text(found, f"{name}, {size}, {dtype}, {user_table.device_name(images.device)}"))
    where = user_table.write({tuned.key: tuned.entry for tuned in found})
    say(f"{len(found)} classes of block, kept in {where}")
