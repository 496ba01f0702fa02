"""Draws the pictures of `docs/pages/studies.md` and README.md and writes the page's sentences, from the committed
results of `fusedres study all`, `bench/results/studies/results.json`, and from nothing else: `python docs/studies.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from fusedres.cli.study import main, panels

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/studies/results.json"
PAGE = ROOT / "docs/pages/studies.md"
WRITTEN = "<!-- written by docs/studies.py: {} -->"
END = "<!-- end -->"
SHOWN = {name: modules.shown for name, modules in main.PLOTS.items()}


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())


def digest() -> str:
    """Of the committed results: what says that a picture is of these and no others."""
    return hashlib.sha256(RESULTS.read_bytes()).hexdigest()[:16]


def picture(name: str) -> Path:
    return ROOT / f"docs/pages/study-{name}.svg"


def drawn(name: str) -> str:
    data = read()["studies"][name]["data"]
    return panels.svg(SHOWN[name](data), Description=f"results {digest()}")


def sentences(name: str) -> str:
    """A study's claims as a list, each with whether it shows, and its figures."""
    return "\n".join(f"- {claim['sentence']}" for claim in read()["studies"][name]["claims"])


def written() -> str:
    """The page with the sentences of the committed results."""
    page = PAGE.read_text()
    for name in SHOWN:
        begin = WRITTEN.format(name)
        pattern = re.compile(f"{re.escape(begin)}\n.*?{END}", re.DOTALL)
        page, count = pattern.subn(lambda _, n=name, b=begin: f"{b}\n{sentences(n)}\n{END}", page)
        assert count == 1, f"{PAGE} has no place for the sentences of study {name}"
    return page


if __name__ == "__main__":
    for name in SHOWN:
        picture(name).write_text(drawn(name))
    PAGE.write_text(written())
