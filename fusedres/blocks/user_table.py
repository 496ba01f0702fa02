"""The user table: which recipe was fastest on this machine, as `fusedres tune` or a trial found. Data in a JSON file.

    FUSEDRES_TABLE=/path/to/table.json    where it is; by default fusedres/table.json below $XDG_CACHE_HOME or ~/.cache

An entry holds for one device, one set of versions, and one class of call: everything a `Key` has. A file that is not
such a table is ignored, with one warning, and so is a FUSEDRES_TABLE that is not there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.blocks import RECIPES, machine
from fusedres.blocks.config import BlockConfig, ConvBNTensors, Shortcut
from fusedres.ops.dispatch import Dispatcher

ENVIRONMENT_VARIABLE = "FUSEDRES_TABLE"
KIND = "fusedres recipes measured on this machine"
UNFUSED = "unfused"
TOGETHER = "together"  # of a whole model: what its blocks won stays
EAGER, CUDA_GRAPH = "eager", "cuda graph"  # how calls run


class Key(NamedTuple):
    """What an entry is for. `call` is a class of block, as `block_class` names it.

    exact: of one batch size, as trials measure, and not of all those down to a power of two. libraries: those that
    torch calls on the device. mode: EAGER or CUDA_GRAPH.
    """

    device: str
    versions: str
    backend: str
    dtype: str
    gradients: bool
    call: str
    exact: bool = False
    libraries: str = ""
    mode: str = EAGER


@dataclass(frozen=True)
class Entry:
    """The fastest recipe, and how many times as fast as the original forward it was; source: what measured it."""

    recipe: str
    ratio: float
    source: str = "tune"


_recorded: ContextVar[list[Key] | None] = ContextVar("fusedres_recorded_keys", default=None)


def path() -> Path:
    """Where the table is, or would be."""
    given = os.environ.get(ENVIRONMENT_VARIABLE)
    if given:
        return Path(given)
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "fusedres" / "table.json"


@lru_cache(maxsize=4096)
def block_class(
    config: BlockConfig, weights: tuple[torch.Size, ...], x: torch.Size, exact: bool = False
) -> str:
    """A block and the size of its input in words.

    Args:
        weights: shapes of the convolutions' weights, as `config.units`.
        x: shape [N, C, H, W].
        exact: whether the batch is named as it is, and not down to a power of two.
    """
    parts = []
    for unit, (cout, _, kh, kw) in zip(config.units, weights, strict=True):
        numbers = "x".join(map(str, (kh, kw))) + f"-{cout}"
        for letter, value, usual in (
            ("s", unit.stride, (1, 1)),
            ("d", unit.dilation, (1, 1)),
            ("g", unit.groups, 1),
        ):
            if value != usual:
                numbers += letter + ("x".join(map(str, value)) if isinstance(value, tuple) else str(value))
        parts.append(numbers + ("" if unit.training else "f") + ("" if unit.relu else "n"))
    if config.pool is not None:
        parts.append("maxpool" + "x".join(map(str, config.pool)))
    shortcut = "" if config.shortcut is Shortcut.NONE else f" + {config.shortcut.value}"
    batch, *rest = x
    size = "x".join(map(str, (batch if exact else 1 << (batch.bit_length() - 1), *rest)))
    return f"{size}: {' '.join(parts)}{shortcut}"


def parse(file: Path) -> dict[Key, Entry]:
    """The table in a file.

    Raises:
        OSError, ValueError, TypeError, KeyError: it is not there, or something else.
    """
    data = json.loads(file.read_text())
    if data["kind"] != KIND:
        raise ValueError(f"its kind is {data['kind']!r}")
    found = {Key(**entry["key"]): Entry(**entry["found"]) for entry in data["entries"]}
    if not all(isinstance(e.ratio, (int, float)) and math.isfinite(e.ratio) for e in found.values()):
        raise ValueError("a ratio is no number")
    unknown = {entry.recipe for entry in found.values()} - {UNFUSED, TOGETHER, *RECIPES}
    if unknown:
        raise ValueError(f"its recipes {sorted(unknown)} are unknown")
    return found


def read(file: Path, is_expected: bool = False) -> dict[Key, Entry]:
    """The table in a file; {} where there is none, with a warning if one is expected or it is something else."""
    try:
        return parse(file)
    except FileNotFoundError:
        if is_expected:
            warnings.warn(
                f"fusedres: {ENVIRONMENT_VARIABLE} names {file}, which is not there and is ignored. "
                f"Write it with `fusedres tune`, or unset {ENVIRONMENT_VARIABLE}.",
                RuntimeWarning,
                stacklevel=2,
            )
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(
            f"fusedres: {file} is no table of recipes ({type(error).__name__}: {error}) and is ignored. "
            f"Remove it, write it anew with `fusedres tune`, or set {ENVIRONMENT_VARIABLE}.",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


@cache
def table() -> Mapping[Key, Entry]:
    """This process's table, read at its first use."""
    # keys are recorded for a table that is about to be written
    return read(path(), is_expected=bool(os.environ.get(ENVIRONMENT_VARIABLE)) and _recorded.get() is None)


@cache
def devices(exact: bool = False) -> frozenset[str]:
    """Those with an entry for classes of calls, or for calls of one batch size."""
    return frozenset(key.device for key in table() if key.exact is exact)


def forget() -> None:
    """The file is read again at the next use, as after it was written."""
    table.cache_clear()
    devices.cache_clear()


def plain(entries: Mapping[Key, Entry]) -> list[dict[str, Any]]:
    """The entries as a file holds them."""
    return [{"key": key._asdict(), "found": asdict(entry)} for key, entry in entries.items()]


def write(entries: Mapping[Key, Entry]) -> Path:
    """Puts entries into the user's table, beside those of other keys; returns its path.

    The file is replaced as a whole: a reader sees the old one or the new one. Writers wait for one another, so that
    none loses what another found.

    Raises:
        OSError: the folder cannot be made or written.
    """
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.parent):
        replace(file, {"kind": KIND, "entries": plain({**read(file), **entries})})
    forget()
    return file


def replace(file: Path, data: Any) -> None:
    """Writes a file as JSON: a reader sees the old one or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(descriptor, "w") as stream:
            json.dump(data, stream, indent=1)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the context no other process, and no other thread, is in it with this folder; on POSIX systems."""
    if find_spec("fcntl") is None:
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # of the folder itself: a file of its own would stay behind
        yield
    finally:
        os.close(descriptor)


@contextmanager
def recorded_keys() -> Iterator[list[Key]]:
    """Within the context, in this thread, the keys that calls look up."""
    keys: list[Key] = []
    token = _recorded.set(keys)
    try:
        yield keys
    finally:
        _recorded.reset(token)


def are_recorded() -> bool:
    """Whether keys that calls look up are recorded now, in this thread."""
    return _recorded.get() is not None


def is_consulted(device: torch.device) -> bool:
    """Whether a look-up for a class of calls there can matter: without an entry none does."""
    return are_recorded() or (bool(devices()) and machine.device_name(device) in devices())


def has_trials(device: torch.device) -> bool:
    """Whether a look-up of what trials found there can matter."""
    found = devices(exact=True)
    return bool(found) and machine.device_name(device) in found


def key_of(
    x: Tensor,
    config: BlockConfig,
    units: tuple[ConvBNTensors, ...],
    ops: Dispatcher,
    gradients: bool,
    exact: bool = False,
) -> Key:
    """What a call of a block is looked up by. gradients: whether any is wanted; exact: as for `block_class`."""
    backend, name = ops.backend_on(x), str(config.dtype).removeprefix("torch.")
    call = block_class(config, tuple(t.weight.shape for t in units), x.shape, exact)
    where = machine.device_name(x.device), machine.versions(), backend, name
    return Key(*where, gradients, call, exact, machine.libraries(x.device))


def key_of_all(keys: Iterable[Key], what: str, mode: str = EAGER) -> Key:
    """What the blocks of a model are looked up by together. keys: theirs, one at least; what: they are, in words."""
    found = sorted(keys)
    digest = hashlib.sha256(repr(found).encode()).hexdigest()[:16]
    return found[0]._replace(call=f"{len(found)} blocks of a model {what}: {digest}", mode=mode)


def block_recipe(
    x: Tensor, config: BlockConfig, units: tuple[ConvBNTensors, ...], ops: Dispatcher, gradients: bool
) -> str | None:
    """What the table names for this class of calls of a block, or None. gradients: whether any is wanted."""
    if not is_consulted(x.device):
        return None
    key = key_of(x, config, units, ops, gradients)
    if (keys := _recorded.get()) is not None:
        keys.append(key)
    entry = table().get(key)
    return None if entry is None else entry.recipe
