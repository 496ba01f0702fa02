"""A hook of MkDocs: below each heading of the page of reason codes, the sentence that the package prints for it."""

from __future__ import annotations

import re
from typing import Any

from fusedres.patching.reasons import REASONS

HEADING = re.compile(r"^### `(\w+)`$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri != "reasons.md":
        return markdown
    return HEADING.sub(lambda found: f"{found[0]}\n\n> {REASONS[found[1]]}\n", markdown)
