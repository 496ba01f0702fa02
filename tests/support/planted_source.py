"""A module made from another one's source with a bug planted in it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType


def with_replacements(
    module: ModuleType, replacements: Iterable[tuple[str, str]], folder: Path
) -> ModuleType:
    """The module as it would be with each first string, which has to stand in it once, replaced by the second."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    for old, new in replacements:
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__file__}"
        source = source.replace(old, new)
    path = folder / "planted.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec is not None and spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    return planted
