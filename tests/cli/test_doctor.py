"""`fusedres doctor`: what it finds, and that its self-test finds wrong results."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from fusedres.cli import doctor
from fusedres.cli.app import app
from fusedres.ops import dispatch, selftest
from fusedres.ops.backend import Backend
from fusedres.ops.cases import SMALL, cases
from fusedres.ops.contract import (
    RAW_OPS,
    BnReluMaxpoolForward,
    BnScaleShift,
    BnStats,
    Conv1x1Forward,
    ConvBackwardWeight,
    Gram,
    op_name,
)
from fusedres.ops.native import functions, library, products, reasons
from fusedres.ops.reference import REFERENCE
from fusedres.trials import registry

CPU = torch.device("cpu")
run = CliRunner().invoke
EMPTY = {
    **{key: {} for key in ("versions", "native_library", "backends", "install", "wheel", "trials")},
    **{key: [] for key in ("serving", "recipe_table", "selftest", "advice")},
    "passed": True,
}


def changed(op, change):
    """The reference's function of an op, with its result changed."""
    right = REFERENCE.functions[op]
    return {op: lambda record: change(right(record))}


def raising(record):
    raise RuntimeError("no kernel image is available")


# wrong in some ops, each in its own way, and raising in another
BROKEN = Backend(
    "broken",
    {
        **REFERENCE.functions,
        **changed(BnStats, lambda found: (found[0], found[1] * (1 + 1e-4))),
        **changed(BnReluMaxpoolForward, lambda found: (found[0], torch.where(found[1] == 255, 0, found[1]))),
        **changed(BnScaleShift, lambda vectors: vectors._replace(shift=vectors.shift[:-1])),
        **changed(Gram, lambda found: (found[0], torch.full_like(found[1], float("nan")))),
        ConvBackwardWeight: raising,
    },
    {Conv1x1Forward: lambda record: "not_here"},
)


@pytest.fixture
def with_broken_backend(monkeypatch):
    monkeypatch.setitem(dispatch.LOADERS, "broken", lambda: BROKEN)
    monkeypatch.setattr(selftest, "SMALL", SMALL[:1])


def test_cases_cover_every_raw_op():
    assert {type(case.op) for case in cases(SMALL[0], torch.float32, CPU)} == set(RAW_OPS.values())


@pytest.mark.parametrize("dtype", selftest.DTYPES, ids=doctor.dtype_name)
def test_plain_pytorch_passes_the_self_test_in_every_dtype(dtype):
    for case in cases(SMALL[1], dtype, CPU):
        assert selftest.outcome(REFERENCE, CPU, dtype, case).problem is None, case.name


def test_every_backend_passes_here():
    outcomes = selftest.run()
    assert [o for o in outcomes if o.problem] == []
    assert library.is_built() == any(o.backend == "native" and not o.unserved for o in outcomes)


@pytest.mark.skipif(not library.is_built(), reason="no compiled library in this installation")
def test_every_native_op_is_tested_and_shown_where_it_serves():
    """In float32 on the CPU, what has a kernel there; convolutions in each form that has a kernel of its own."""
    backend, forms = functions.backend(), {"conv1x1_forward/inference", "conv_backward_input/strided"}
    here = {op_name(op) for op in backend.functions if op in reasons.REASONS}
    assert here | {op_name(op) for op in products.PRODUCTS} == {op_name(op) for op in backend.functions}
    for shape in SMALL[-2:]:
        called = list(cases(shape, torch.float32, CPU))
        tested = {case.name for case in called if backend.reason(case.op) is None}
        assert {name.partition("/")[0] for name in tested} == here
        assert forms <= tested
    (row,) = [row for row in doctor.serving() if (row["device"], row["dtype"]) == ("cpu", "float32")]
    assert {name for name, served_by in row.items() if served_by == "native"} == tested


def test_the_self_test_finds_wrong_results(with_broken_backend):
    wrong = {
        o.case.partition("/")[0]: o.problem for o in selftest.run() if o.backend == "broken" and o.problem
    }
    failed = "conv_backward_weight"
    assert set(wrong) == {"bn_stats", failed, "bn_relu_maxpool_forward", "bn_scale_shift", "gram"}
    assert "result 1 has error 1.0e-04" in wrong["bn_stats"] and "nan" in wrong["gram"]
    assert wrong[failed] == "RuntimeError: no kernel image is available"
    assert "result 1 differs in" in wrong["bn_relu_maxpool_forward"]
    assert "result 4 is torch.float32 [7], needed torch.float32 [8]" in wrong["bn_scale_shift"]


def test_exit_codes_and_json(monkeypatch):
    monkeypatch.setattr(selftest, "SMALL", SMALL[:1])
    result = run(app, ["doctor", "--json"])
    found = json.loads(result.output)
    assert result.exit_code == 0 and found["passed"]
    assert found["versions"]["torch"] == torch.__version__ and found["backends"]["reference"] is None
    names = {name for row in found["serving"] for name in row} - {"device", "dtype"}
    assert {name.partition("/")[0] for name in names} == set(RAW_OPS)
    assert "pip install" in found["install"] and found["wheel"].endswith("_x86_64.whl")


def test_a_wrong_result_is_exit_code_1(with_broken_backend):
    result = run(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 1 and "the self-test FAILED" in result.output
    assert "no kernel image is available" in result.output and "not_here" in result.output


def test_a_request_for_an_absent_backend_is_explained(monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "abacus")
    result = run(app, ["doctor"])
    assert result.exit_code == 1 and "'abacus' is not available" in result.output


def test_what_to_install_is_said_only_where_something_is_missing(monkeypatch):
    found = {**EMPTY, "machine": {"gpus": []}}
    assert "to install" not in doctor.text(found)
    monkeypatch.setattr(doctor, "package_version", lambda name: None if name == "typer" else "1")
    (line,) = [line for line in doctor.advice() if "typer" in line]
    assert "fusedres[cli]" in line and f"to install\n  {line}" in doctor.text({**found, "advice": [line]})


def test_whether_recipes_are_tried_is_said(monkeypatch):
    assert registry.summary()["measured_in_first_steps"] == "no: FUSEDRES_TRIAL=0"
    monkeypatch.setenv("FUSEDRES_TRIAL", "1")
    assert "measured in first steps  yes" in doctor.text(
        {**EMPTY, "machine": {"gpus": []}, "trials": registry.summary()}
    )


def test_the_conditions_of_recipe_auto_are_named():
    entry = {"device": "cpu", "backend": "native", "dtype": "float32", "gradients": True}
    entry |= {"recipe": "separate", "least_elements": 400_000, "least_channels": 64, "where": "a machine"}
    heads, row, where = doctor.recipe_table_text([entry]).splitlines()[1:]
    for name, value in (("recipe", "separate"), ("gradients", "wanted"), ("from elements of x", "400,000")):
        assert heads.index(name) == row.index(value)
    assert where.endswith("measured on a machine")


def test_an_op_served_by_plain_pytorch_once_is_not_said_to_have_no_kernel():
    row = {"device": "cpu", "dtype": "float32", **dict.fromkeys(RAW_OPS, "reference")}
    note = "native leaves sizes to the library"
    assert note not in doctor.serving_text([row])
    assert note in doctor.serving_text([row | {"bn_stats": "native"}])


def test_an_installation_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "absent.so")
    without = {name: load for name, load in dispatch.LOADERS.items() if name != "native"}
    for module in (dispatch, selftest):
        monkeypatch.setattr(module, "LOADERS", without)  # not delitem: taken back, it would come last
    library.load.cache_clear()
    try:
        found = doctor.native_library()
        assert "is not there" in found["problem"] and found["cpu_kernels"] is None
        assert "pip install ." in found["problem"], "else the build does not see torch"
        assert "the native backend is absent" in doctor.advice()[0]
    finally:
        library.load.cache_clear()


@pytest.mark.skipif(not library.is_built(), reason="no compiled library in this installation")
def test_gpus_with_and_without_code(monkeypatch):
    """Two devices, as torch and the library would describe them."""
    described = [SimpleNamespace(name="A", major=9, minor=0, total_memory=2**36)]
    described.append(SimpleNamespace(name="B", major=12, minor=0, total_memory=2**35))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", described.__getitem__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    problems = ["", "it holds code for 90, needed sm_120"]
    monkeypatch.setattr(torch.ops.fusedres_native, "cuda_device_problem", problems.__getitem__)
    first, second = doctor.gpus()
    assert first["native_code"] and first["problem"] is None and first["arch"] == "sm_90"
    assert not second["native_code"] and second["problem"] == problems[1] and second["memory_gib"] == 32.0
    assert doctor.install_line().startswith('FUSEDRES_BUILD=cuda FUSEDRES_CUDA_ARCHS="120;90" pip install')
    assert "+cu*.sm120.sm90-py3-none-" in doctor.wheel_name()
    assert "does not run on every GPU" in doctor.advice()[0]
    said = doctor.text({**EMPTY, "machine": {"gpus": [first, second]}})
    assert "cuda:0\n" in said and "cuda:1\n" in said and problems[1] in said
