"""The user table: what is read, written and ignored, and that recipe "auto" follows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from block_forms import basic, bottleneck, projected

import fusedres
from fusedres.blocks import machine, user_table
from fusedres.blocks.user_table import Entry, Key
from fusedres.models import resnet18

KEY = Key("a device", "fusedres 1, torch 2", "reference", "float32", True, "a block")


@pytest.fixture(autouse=True)
def table_file(tmp_path, monkeypatch):
    """A table of its own for each test."""
    file = tmp_path / "below" / "table.json"
    monkeypatch.setenv("FUSEDRES_TABLE", str(file))
    user_table.forget()
    yield file
    user_table.forget()


def x_for(cin=32, batch=3):
    return torch.randn(batch, cin, 6, 6).to(memory_format=torch.channels_last)


def key_of(module, x):
    with user_table.recorded_keys() as keys:
        module(x)
    (key,) = keys
    return key


def test_location(monkeypatch, table_file, tmp_path):
    assert user_table.path() == table_file
    monkeypatch.delenv("FUSEDRES_TABLE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_table.path() == tmp_path / "fusedres" / "table.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_table.path() == tmp_path / "home" / ".cache" / "fusedres" / "table.json"


def test_what_is_written_is_read_beside_what_was_there(table_file):
    other = KEY._replace(gradients=False)
    user_table.write({KEY: Entry("gram", 1.5)})
    assert user_table.write({other: Entry("unfused", 1.0)}) == table_file
    assert user_table.table() == {KEY: Entry("gram", 1.5), other: Entry("unfused", 1.0)}
    user_table.write({KEY: Entry("separate", 1.2)})
    assert user_table.table()[KEY] == Entry("separate", 1.2)
    assert os.listdir(table_file.parent) == ["table.json"]


def test_a_failed_write_leaves_the_old_table(table_file, monkeypatch):
    user_table.write({KEY: Entry("gram", 1.5)})
    before = table_file.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        user_table.write({KEY: Entry("separate", 2.0)})
    assert table_file.read_bytes() == before and os.listdir(table_file.parent) == ["table.json"]


def test_writers_at_once_lose_nothing(table_file):
    """Four processes of two threads, each with keys of its own."""
    code = """
import sys, threading
from fusedres.blocks import user_table
from fusedres.blocks.user_table import Entry, Key

def write(thread):
    for i in range(10):
        key = Key("a device", "1", "reference", "float32", True, f"{sys.argv[1]} {thread} {i}")
        user_table.write({key: Entry("gram", 1.5)})

threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(i)]) for i in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    calls = {key.call for key in user_table.table()}
    assert calls == {f"{i} {thread} {n}" for i in range(4) for thread in range(2) for n in range(10)}
    assert os.listdir(table_file.parent) == ["table.json"]


def entries(found=None, **key):
    return {"kind": user_table.KIND, "entries": [{"key": {**KEY._asdict(), **key}, "found": found}]}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "\x00\xff",
        "[]",
        "null",
        json.dumps({"kind": "another tool's"}),
        json.dumps({"kind": user_table.KIND}),
        json.dumps({"kind": user_table.KIND, "entries": 3}),
        json.dumps(entries({"recipe": "fastest", "ratio": 2.0})),
        json.dumps(entries({"recipe": ["gram"], "ratio": 2.0})),
        json.dumps(entries({"ratio": 2.0})),
        json.dumps(entries({"recipe": "gram", "ratio": 2.0}, more=1)),
        json.dumps(entries({"recipe": "gram", "ratio": 2.0}, call=[])),
    ],
)
def test_a_corrupt_or_foreign_file_is_ignored_with_one_warning(table_file, content):
    table_file.parent.mkdir()
    table_file.write_text(content, encoding="latin1")
    block = fusedres.patch(bottleneck()())
    with pytest.warns(RuntimeWarning, match="ignored") as caught:
        for _ in range(3):
            block(x_for())
    assert len(caught) == 1
    assert fusedres.report(block).blocks[0].runs_as == "unfused"


def test_a_folder_in_its_place_is_ignored(table_file):
    table_file.mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="ignored"):
        assert user_table.table() == {}


@pytest.mark.parametrize("recipe", ["separate", "gram", "unfused"])
def test_auto_follows_the_table(recipe):
    block = fusedres.patch(bottleneck()())
    x = x_for()
    key = key_of(block, x)
    user_table.write({key: Entry(recipe, 1.3)})
    block(x)
    (row,) = fusedres.report(block).blocks
    assert row.runs_as == recipe and row.code == ("no_faster_recipe" if recipe == "unfused" else None)
    with torch.no_grad():  # no gradients: another key
        block(x)
    assert fusedres.report(block).blocks[0].runs_as == "unfused"


def test_a_request_goes_before_the_table():
    block, x = fusedres.patch(bottleneck()()), x_for()
    user_table.write({key_of(block, x): Entry("gram", 1.3)})
    fusedres.patch(block, recipe="separate")
    block(x)
    assert fusedres.report(block).blocks[0].runs_as == "separate"


def test_stems_are_in_the_table():
    model = fusedres.patch(resnet18(), include="stem")
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    user_table.write({key_of(model, x): Entry("separate", 1.3)})
    model(x)
    assert fusedres.report(model).matched[0].runs_as == "separate"


def test_classes_of_calls():
    """The same for blocks that cost the same, another for each thing that changes the cost."""
    plain = key_of(fusedres.patch(bottleneck()()), x_for())
    assert plain.call == "2x32x6x6: 1x1-8 3x3-8 1x1-32 + identity"
    assert key_of(fusedres.patch(bottleneck()()), x_for(batch=2)) == plain
    others = [
        key_of(fusedres.patch(bottleneck()()), x_for(batch=4)),
        key_of(fusedres.patch(bottleneck(lambda b: b.eval())()), x_for()),
        key_of(fusedres.patch(bottleneck(cin=64, width=16)()), x_for(64)),
        key_of(fusedres.patch(basic(cin=32, width=32)()), x_for()),
        key_of(fusedres.patch(projected()()), x_for(16)),
        key_of(fusedres.patch(bottleneck()().bfloat16()), x_for().bfloat16()),
        key_of(fusedres.patch(bottleneck()(), backend="reference"), x_for()),
    ]
    backends = len(fusedres.ops.dispatch.backend_names()) > 2  # else the reference serves either way
    assert len({plain, *others}) == len(others) + (1 if backends else 0)


def test_device_and_versions():
    name = machine.device_name(torch.device("cpu"))
    assert f"{torch.get_num_threads()} threads" in name and not name.startswith(",")
    assert f"torch {torch.__version__.partition('+')[0]}" in machine.versions()


def test_keys_are_recorded_in_this_thread_only():
    block, x = fusedres.patch(bottleneck()()), x_for()
    with user_table.recorded_keys() as keys:
        thread = threading.Thread(target=block, args=(x,))
        thread.start()
        thread.join()
    assert keys == []


def test_a_named_table_that_is_not_there_is_told_once(table_file):
    block = fusedres.patch(bottleneck()())
    with pytest.warns(RuntimeWarning, match="FUSEDRES_TABLE names .*, which is not there") as caught:
        for _ in range(3):
            block(x_for())
    assert len(caught) == 1 and str(table_file) in str(caught[0].message)


def test_a_named_table_is_made_without_a_warning(table_file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        user_table.write({key_of(fusedres.patch(bottleneck()()), x_for()): Entry("unfused", 1.0)})
        assert len(user_table.table()) == 1


def test_without_a_table_nothing_is_looked_up(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSEDRES_TABLE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "device_name", lambda device: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedres.patch(bottleneck()())(x_for())
