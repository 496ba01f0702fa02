"""For every test: neither the table of recipes measured on this machine nor a terminal's width has a say."""

import json
import os

import pytest

from fusedres.blocks.user_table import KIND

# pytest's worker processes are given a width that Rich, once imported, would keep
os.environ.pop("COLUMNS", None)


@pytest.fixture(autouse=True, scope="session")
def no_user_table(tmp_path_factory):
    empty = tmp_path_factory.mktemp("table") / "table.json"
    empty.write_text(json.dumps({"kind": KIND, "entries": []}))
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("FUSEDRES_TABLE", str(empty))
        yield
