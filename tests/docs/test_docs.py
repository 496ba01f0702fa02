"""The documentation: its site builds strictly, its code runs, its plot is that of the committed results."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusedres.patching.reasons import REASONS

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs/pages"
WRITTEN = [ROOT / "README.md", *sorted(PAGES.glob("*.md"))]
BLOCK = re.compile(
    r"^```python(?: title=\"(?P<title>[^\"]*)\")?\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
NOT_RUN = "Not run by the tests: "
MOST_NOT_RUN = 3


def run(*command: object, **options: Any) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr


def blocks(page: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(page.read_text()))


def is_run(block: re.Match[str]) -> bool:
    return not (block["title"] or "").startswith(NOT_RUN)


def as_under_torchrun() -> dict[str, str]:
    """The variables that torchrun gives to the one process of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def script(page: Path) -> str:
    """The blocks of a page in their order, each in the lines that it has there, so that a traceback names them."""
    lines = [""] * page.read_text().count("\n")
    for block in filter(is_run, blocks(page)):
        first = page.read_text()[: block.start("code")].count("\n")
        code = block["code"].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


@pytest.mark.parametrize("page", [page for page in WRITTEN if blocks(page)], ids=lambda page: page.stem)
def test_the_code_runs(page, tmp_path):
    """In a process of its own: process groups and accelerate's state outlive their users."""
    file = tmp_path / f"{page.stem}.py"
    file.write_text(script(page))
    environment = {**os.environ, **as_under_torchrun(), "OMP_WAIT_POLICY": "passive"}
    run(sys.executable, file, env=environment, cwd=tmp_path)


def test_no_block_is_missed():
    """Every fence that begins with `python` is read by the pattern above, and few are left out."""
    found = [block for page in WRITTEN for block in blocks(page)]
    fences = sum(
        len(re.findall(r"^\s*```\s*\{?\.?python", page.read_text(), re.MULTILINE)) for page in WRITTEN
    )
    assert len(found) == fences
    assert sum(not is_run(block) for block in found) <= MOST_NOT_RUN


def test_every_reason_code_has_its_entry():
    headings = re.findall(r"^### `(\w+)`$", (PAGES / "reasons.md").read_text(), re.MULTILINE)
    assert headings == list(REASONS)


def test_the_site(tmp_path):
    """`make docs`, into another folder: broken links and anchors fail; pages load nothing from elsewhere."""
    build = ("-m", "mkdocs", "build", "--strict", "--quiet", "-f", "docs/mkdocs.yml", "-d", tmp_path)
    run(sys.executable, *build, cwd=ROOT)
    for page in WRITTEN[1:]:
        html = (tmp_path / f"{page.stem}.html").read_text()
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(https?://[^\s\">]+)", html)
        assert not loaded, f"{page.stem}.html loads {loaded}"
    reasons = (tmp_path / "reasons.html").read_text()
    assert all(f'id="{code}"' in reasons for code in REASONS)


def test_the_committed_plot_is_of_these_results():
    sys.path.insert(0, str(ROOT / "docs"))
    import plots

    assert f"results {plots.digest()}" in plots.README_PLOT.read_text(), "run `python docs/plots.py`"


def test_the_pictures_and_sentences_of_the_studies_are_of_the_committed_results():
    sys.path.insert(0, str(ROOT / "docs"))
    import studies

    for name in studies.SHOWN:
        assert f"results {studies.digest()}" in studies.picture(name).read_text(), (
            "run `python docs/studies.py`"
        )
        assert studies.picture(name).name in (ROOT / "README.md").read_text()
    assert studies.written() == studies.PAGE.read_text(), "run `python docs/studies.py`"
