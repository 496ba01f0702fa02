"""For every test: no recipe measured on this machine, before or in the test, and no terminal's width has a say.

And which files come first: of two processes, one would else be left with a minute's test of a file that comes last.
"""

import json
import os
from contextlib import contextmanager

import pytest

from fusedres.blocks.user_table import KIND

# pytest's worker processes are given a width that Rich, once imported, would keep
os.environ.pop("COLUMNS", None)

# the files that take half a minute and more, the longest first
FIRST = (
    "test_cuda_sanitizers",
    "test_cuda_resources",
    "test_triton_interpreter",
    "test_study",
    "test_patching",
    "test_cuda_host",
    "test_examples",
    "test_bench_report",
    "test_docs",
    "test_compile",
    "test_blocks",
    "test_cli",
    "test_study_claims",
    "test_cuda_host_networks",
    "test_native_instruction_sets",
    "test_verify",
    "test_recording_on_stand_in",
    "test_native_winograd",
    "test_tuning",
    "test_native_ops",
    "test_demo",
    "test_raw_ops",
    "test_opaque_ops",
)


def pytest_configure(config):
    """In a worker process pytest-cov starts a first tracer whose data it throws away, and a second one above it: where
    `no_cover` stops that, the first would go on, and take the time that nobody wants to give."""
    plugin = config.pluginmanager.getplugin("_cov")
    if hasattr(config, "workerinput") and plugin and plugin.cov_controller:
        plugin.cov_controller.cov.stop()


def pytest_collection_modifyitems(items):
    """A file of tests goes to whichever process is free, in this order."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)))


@pytest.fixture(scope="session")
def untraced(pytestconfig):
    """A context in which coverage does not trace, which takes as long again: of a fixture, as `no_cover` of a test."""
    plugin = pytestconfig.pluginmanager.getplugin("_cov")
    controller = plugin and plugin.cov_controller

    @contextmanager
    def context():
        if controller:
            controller.pause()
        try:
            yield
        finally:
            if controller:
                controller.resume()

    return context


@pytest.fixture(autouse=True, scope="session")
def no_user_table(tmp_path_factory):
    empty = tmp_path_factory.mktemp("table") / "table.json"
    empty.write_text(json.dumps({"kind": KIND, "entries": []}))
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("FUSEDRES_TABLE", str(empty))
        patching.setenv("FUSEDRES_TRIAL", "0")
        yield
