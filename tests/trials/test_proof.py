"""A backend that is wrong is found out before it serves a model, named, and never serves it."""

import sys
import threading
import warnings

import faulty_backends
import pytest
import torch
from faulty_backends import NAME, OP, loaders
from trials_on import told, trials_on

import fusedres
from fusedres.blocks import user_table
from fusedres.models import BasicBlock
from fusedres.ops import dispatch, set_aside
from fusedres.ops.contract import RawOp
from fusedres.ops.dispatch import Dispatcher
from fusedres.trials import proof, proof_process, proof_record, registry
from fusedres.trials.trial import ORIGINAL

COSTS = {ORIGINAL: 1.5, "separate": 1.0}


@pytest.fixture
def patching(tmp_path):
    with trials_on(tmp_path) as patching:
        told(patching, COSTS.__getitem__)
        yield patching
    dispatch._dispatcher.cache_clear()


def use(patching, fault):
    patching.setattr(dispatch, "LOADERS", loaders(fault))
    patching.setattr(dispatch, "AUTO_LOADERS", {})
    dispatch._dispatcher.cache_clear()


def in_process_of_its_own(patching, *arguments):
    """As on a GPU of which no clean run is known."""
    patching.setattr(proof_process, "COMMAND", (sys.executable, faulty_backends.__file__, *arguments))
    patching.setattr(proof, "needs_process", lambda question: not proof_record.has_clean_run(question))


def block():
    torch.manual_seed(0)
    return BasicBlock(8, 8)


def train(model):
    for i in range(24):
        model(torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(i))).sum().backward()
    return fusedres.report(model).matched[-1].runs_as


@pytest.fixture
def served(monkeypatch):
    """By op, the backends that served a model's calls."""
    seen = {}
    right = Dispatcher.__call__

    def call(self: Dispatcher, op: RawOp):
        seen.setdefault(dispatch.op_name(type(op)), set()).add(self.serving(op).name)
        return right(self, op)

    monkeypatch.setattr(Dispatcher, "__call__", call)
    return seen


@pytest.mark.parametrize(
    "fault, said",
    [
        ("wrong", r"faulty computes bn_add_relu_forward wrongly on cpu \(result 0 has error 1.0e-03, limit"),
        (
            "raises",
            r"faulty computes bn_add_relu_forward wrongly on cpu \(RuntimeError: a kernel that raises",
        ),
        ("runs_out_of_memory", r"wrongly on cpu \(OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_a_faulty_op_is_named_and_another_backend_serves_it(patching, served, fault, said):
    use(patching, fault)
    with pytest.warns(RuntimeWarning, match=said) as warned:
        assert train(fusedres.patch(block())) == "separate"
    assert len(warned) == 1
    assert served.pop(OP) == {"reference"} and set().union(*served.values()) == {NAME}


def test_what_was_found_is_known_in_the_next_process(patching, served):
    use(patching, "raises")
    with pytest.warns(RuntimeWarning, match="wrongly"):
        train(fusedres.patch(block()))
    proof.forget()
    set_aside.forget()
    patching.setattr(proof, "answer", None)
    registry.forget()
    assert user_table.table()  # the recipe is known, and what is wrong has to be set aside all the same
    with pytest.warns(RuntimeWarning, match="wrongly"):
        train(fusedres.patch(block()))
    assert served[OP] == {"reference"}


def test_out_of_memory_is_of_the_moment_and_not_kept(patching):
    use(patching, "runs_out_of_memory")
    with pytest.warns(RuntimeWarning, match="OutOfMemoryError"):
        train(fusedres.patch(block()))
    assert not proof_record.records()


def test_a_clean_backend_is_proved_once(patching):
    patching.setattr(dispatch, "LOADERS", {NAME: clean, "reference": loaders("wrong")["reference"]})
    dispatch._dispatcher.cache_clear()
    asked = []
    right = proof.answer
    patching.setattr(proof, "answer", lambda *args: asked.append(args) or right(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(2):
            train(fusedres.patch(block()))
    assert len(asked) == 1
    (record,) = proof_record.records()
    assert record["faults"] == [] and (record["key"]["narrow"], record["key"]["wide"]) == (8, 8)


def clean():
    return faulty_backends.Backend(NAME, dict(faulty_backends.REFERENCE.functions))


def test_a_crash_in_a_process_of_its_own_is_named(patching, served):
    use(patching, "dies")
    in_process_of_its_own(patching, "dies")
    with pytest.warns(
        RuntimeWarning, match=rf"{OP} wrongly on cpu \(a process that ran it was killed by SIGSEGV"
    ):
        assert train(fusedres.patch(block())) == "separate"
    assert served[OP] == {"reference"}


def test_a_lost_gpu_ends_the_process_and_the_others_are_asked_in_another(patching, served):
    use(patching, "loses_the_gpu")
    in_process_of_its_own(patching, "loses_the_gpu")
    said = rf"{OP} wrongly on cpu \(a process that ran it ended with 1: .*illegal memory access"
    with pytest.warns(RuntimeWarning, match=said) as warned:
        assert train(fusedres.patch(block())) == "separate"
    assert len(warned) == 1 and served[OP] == {"reference"}


def test_a_process_that_cannot_begin_leaves_blocks_alone_and_says_so_once(patching, served):
    use(patching, "dies")
    in_process_of_its_own(patching, "dies", "at once")
    model = fusedres.patch(block())
    with pytest.warns(
        RuntimeWarning, match=r"no kernel could be proved on cpu .*no GPU for this process"
    ) as warned:
        assert train(model) == "unfused"
    assert len(warned) == 1 and not served
    code = fusedres.report(model).matched[-1].code
    assert (
        code.startswith("not_measured_here:no kernel could be proved") and "no GPU for this process" in code
    )


def test_a_question_goes_to_the_process_and_back(patching):
    use(patching, "wrong")
    in_process_of_its_own(patching, "wrong")
    question = proof.Question(torch.device("cpu"), torch.float32, 8, 16, True, True, (NAME,))
    assert proof_process.from_plain(proof_process.as_plain(question, [])) == (question, set())
    faults = proof_process.ask_in_process(question)
    assert [(f.backend, f.op) for f in faults] == [(NAME, OP)]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"kind": "fusedres proofs on this machine", "records": [1, {}]}']
)
def test_a_corrupt_record_counts_as_none(patching, text):
    use(patching, "wrong")
    proof_record.path().write_text(text)
    with pytest.warns(RuntimeWarning, match="wrongly"):
        train(fusedres.patch(block()))
    assert [r["faults"][0][:2] for r in proof_record.records() if "faults" in r] == [[NAME, OP]]


def test_the_native_kernels_pass_at_the_channels_of_resnets(patching):
    backends = tuple(b for b in dispatch.dispatcher().backends if b.name == "native")
    for dtype in (torch.float32, torch.bfloat16):
        for narrow, wide in ((64, 64), (64, 256), (128, 256), (3, 64)):
            question = proof.Question(torch.device("cpu"), dtype, narrow, wide, True, True, ("native",))
            assert proof.answer(question, backends) == []


def test_writers_wait_for_one_another(patching):
    questions = [
        proof.Question(torch.device("cpu"), torch.float32, 8 * thread, i, False, False, (NAME,))
        for thread in range(1, 5)
        for i in range(10)
    ]
    threads = [
        threading.Thread(target=lambda part=part: [proof_record.keep(q, []) for q in part])
        for part in (questions[i::4] for i in range(4))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(proof_record.faults_of(question) == [] for question in questions)
