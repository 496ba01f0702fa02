"""Proof that a recipe's kernels are right here, before the first call of a model is given to them.

Every backend's ops run on small tensors with the channels of the block (`proof_ops.py`), against the reference in
float64, by the rule of `fusedres.ops.accuracy`. Where no clean run is known of on a kind of GPU, they do so in a
process of its own (`proof_process.py`): an illegal access would take the GPU's context along, and the training with it.
An op that fails is set aside, with one warning, so that the next backend serves it. What was found is kept on disk
(`proof_record.py`).
"""

from __future__ import annotations

import warnings
from functools import cache

import torch

from fusedres.blocks.config import BlockConfig, ConvBNTensors
from fusedres.ops import set_aside
from fusedres.ops.dispatch import Dispatcher
from fusedres.trials import proof_record
from fusedres.trials.proof_ops import Fault, Question, answer, questions_of
from fusedres.trials.proof_process import ask_in_process

OUT_OF_MEMORY = "OutOfMemoryError"
_answered: dict[Question, str | None] = {}  # in this process: None, or why nothing could be proved


def is_known(config: BlockConfig, units: tuple[ConvBNTensors, ...], gram: bool, ops: Dispatcher) -> bool:
    """Whether `prove` would run nothing."""
    return all(
        question in _answered or proof_record.faults_of(question) is not None
        for question in questions_of(config, units, gram, ops)
    )


def prove(config: BlockConfig, units: tuple[ConvBNTensors, ...], gram: bool, ops: Dispatcher) -> str | None:
    """Sets aside what is wrong of the ops that this block's recipes need; why nothing could be proved, or None.

    Found out once for channels in a process, and on a machine for one build of the kernels. gram: whether that recipe
    is meant too.
    """
    for question in questions_of(config, units, gram, ops):
        if question not in _answered:
            _answered[question] = proved(question, ops)
        if (why := _answered[question]) is not None:
            return why
    return None


def proved(question: Question, ops: Dispatcher) -> str | None:
    faults = proof_record.faults_of(question)
    if faults is None:
        found = found_out(question, ops)
        if isinstance(found, str):
            warn_unproved(question.device, found)
            return found
        faults = found
        if not any(OUT_OF_MEMORY in fault.problem for fault in faults):  # that is of the moment
            proof_record.keep(question, faults)
    for fault in faults:
        place = set_aside.Place(fault.backend, proof_record.KINDS[fault.op], question.device)
        set_aside.note_wrong(place, fault.problem)
    return None


def forget() -> None:
    """Everything is asked again, as in a new process."""
    _answered.clear()
    warn_unproved.cache_clear()


def needs_process(question: Question) -> bool:
    return question.device.type == "cuda" and not proof_record.has_clean_run(question)


def found_out(question: Question, ops: Dispatcher) -> list[Fault] | str:
    """The faults, or why a process for the question could not begin."""
    if needs_process(question):
        return ask_in_process(question)
    return answer(question, tuple(b for b in ops.backends if b.name in question.backends))


@cache
def warn_unproved(device: torch.device, why: str) -> None:
    warnings.warn(
        f"fusedres: no kernel could be proved on {device} in a process of its own ({why}); patched blocks run as "
        "unpatched there, unless a recipe is named or a table names one.",
        RuntimeWarning,
        stacklevel=2,
    )
