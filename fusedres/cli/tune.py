"""`fusedres tune`: measures the recipes on this machine and writes the user table; shows it, and removes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.blocks import machine, user_table
from fusedres.blocks.user_table import Entry, Key
from fusedres.measuring.progress import Progress
from fusedres.measuring.tune import Tuned, tune
from fusedres.text_table import section
from fusedres.trials import proof_record

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


def results(found: list[Tuned], where: Path) -> dict[str, Any]:
    """What was measured, as plain data."""
    return {
        "path": str(where),
        "classes": [
            {
                **tuned.key._asdict(),
                "blocks": list(tuned.blocks),
                "taken": tuned.entry.recipe,
                "timings": [asdict(timing) for timing in tuned.timings],
                "rejected": tuned.rejected,
            }
            for tuned in found
        ],
    }


def measure_and_keep(
    name: str,
    network: nn.Module,
    images: Tensor,
    *,
    dtype: str,
    backend: str,
    rounds: int,
    as_json: bool,
    progress: Progress,
) -> str:
    """Measures the model in the mode that it is in, writes the user table, and returns what was found, to be shown.

    Raises:
        ValueError, OSError, FusedresError: the dtype is unknown, rounds are too few, the model cannot be tuned, or no
            table written.
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
            progress=progress,
        )
    where = user_table.write({tuned.key: tuned.entry for tuned in found})
    if as_json:
        return json.dumps(results(found, where), indent=2)
    size = " x ".join(map(str, images.shape))
    title = f"{name}, {size}, {dtype}, {machine.device_name(images.device)}"
    return f"{text(found, title)}\n{len(found)} classes of block, kept in {where}"


def kept(file: Path) -> dict[Key, Entry] | None:
    """The table in the file; None where there is none.

    Raises:
        ValueError: the file is something else.
    """
    try:
        return user_table.parse(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is no table of recipes ({type(error).__name__}: {error}), so it is neither shown nor removed; "
            f"needed one that `fusedres tune MODEL` wrote: look at the file, and remove it by hand or set "
            f"{user_table.ENVIRONMENT_VARIABLE}"
        ) from error


def none_there(file: Path) -> str:
    return f"there is no table: {file} does not exist; `fusedres tune MODEL` writes it"


def shown_table(as_json: bool) -> str:
    """The user's table with its path, as aligned text or JSON. Raises as `kept`."""
    file = user_table.path()
    table = kept(file)
    if as_json:
        entries = user_table.plain(table or {})
        return json.dumps({"path": str(file), "exists": table is not None, "entries": entries}, indent=2)
    if table is None:
        return none_there(file)
    heads = ("call", "gradients", "recipe", "times as fast", "found by")
    rows = [(*heads, "backend", "dtype", "device", "versions")]
    for key, entry in table.items():
        wanted = "wanted" if key.gradients else "none"
        ratio = f"{entry.ratio:.2f}"
        where = (key.backend, key.dtype, key.device, key.versions)
        rows.append((key.call, wanted, entry.recipe, ratio, entry.source, *where))
    return section(f"{file}, {len(table)} classes of block", rows)


def clear_table(say: Callable[[str], None]) -> None:
    """Removes the user's table after saying which, and what proofs found before the trials that it is of.

    Raises as `kept`, and OSError where it cannot be removed.
    """
    file = user_table.path()
    table = kept(file)
    if proof_record.remove():
        say(f"removed {proof_record.path()}")
    if table is None:
        say(none_there(file))
        return
    say(f"removing {file}, {len(table)} classes of block")
    file.unlink()
    user_table.forget()
