"""The folder in which a study keeps what it has finished, so that a run that was killed goes on from there.

One file a task, written under another name first: a file that is there is whole. `settings.json` says which study the
files belong to; a run with other settings, images, seeds or versions is refused, and changes nothing.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

FORMAT = 1  # of the files; a later one is not read
SETTINGS = "settings.json"


def write(path: Path, content: bytes) -> None:
    """The whole file or none; what was there before stays if this fails.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise OSError(
            f"fusedres study: {path} cannot be written ({error.strerror}); what is finished stays: make room, or "
            "mend what is in the way, and give the same command again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


class Store:
    """Results and weights by the name of their task."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, identity: dict[str, Any]) -> None:
        """Begins a study, or goes on with it.

        Raises:
            ValueError: the folder holds another study, or one that cannot be read.
        """
        file = self.folder / SETTINGS
        identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        if file.exists():
            self.check(identity, self.read_settings(file))
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(identity, indent=1).encode())

    def read_settings(self, file: Path) -> dict[str, Any]:
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"fusedres study: {file} cannot be read ({error}); {self.way_out}") from error
        if not isinstance(found, dict):
            raise ValueError(f"fusedres study: {file} is no file of a study; {self.way_out}")
        return found

    @property
    def way_out(self) -> str:
        return f"give another --output, or remove {self.folder} to begin anew"

    def check(self, wanted: dict[str, Any], found: dict[str, Any]) -> None:
        for name in dict.fromkeys([*wanted, *found]):
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"fusedres study: {self.folder} was begun with {name} {found.get(name)!r}, this run has "
                    f"{wanted.get(name)!r}; {self.way_out}"
                )

    def path(self, task: str, suffix: str) -> Path:
        return self.folder / f"{task}.{suffix}"

    def has(self, task: str) -> bool:
        return self.path(task, "json").exists()

    def save(self, task: str, result: dict[str, Any]) -> None:
        write(self.path(task, "json"), json.dumps(result).encode())

    def load(self, task: str) -> dict[str, Any]:
        """
        Raises:
            ValueError: the file cannot be read.
        """
        file = self.path(task, "json")
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(
                f"fusedres study: {file} cannot be read ({error}); remove it to do this task again"
            ) from error

    def save_weights(self, task: str, weights: dict[str, torch.Tensor]) -> None:
        stream = io.BytesIO()  # torch's own writing names a full disk an unexpected position
        torch.save(weights, stream)
        write(self.path(task, "pt"), stream.getvalue())

    def load_weights(self, task: str) -> dict[str, torch.Tensor]:
        """
        Raises:
            ValueError: the file is missing or cannot be read.
        """
        file = self.path(task, "pt")
        try:
            return torch.load(file, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"fusedres study: {file} cannot be read ({type(error).__name__}); remove it and "
                f"{self.path(task, 'json').name} to train that network again"
            ) from error
