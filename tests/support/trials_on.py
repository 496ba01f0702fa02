"""Trials for a test: on, with tables that are empty, nothing known before, and times that the test tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.blocks import choice, user_table
from fusedres.models import Bottleneck
from fusedres.ops import set_aside
from fusedres.patching.report import BlockReport
from fusedres.trials import on_block, proof, registry
from fusedres.trials.comparison import Comparison, Step
from fusedres.trials.trial import Ticket, Trial

trial_tell, comparison_tell = Trial.tell, Comparison.tell  # whatever they are told meanwhile


def forget() -> None:
    """As in a new process."""
    registry.forget()
    user_table.forget()
    proof.forget()
    set_aside.forget()


@contextmanager
def trials_on(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Within the context. folder: where the user's table is."""
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("FUSEDRES_TRIAL", "1")
        patching.setenv("FUSEDRES_TABLE", str(folder / "table.json"))
        (folder / "table.json").write_text(f'{{"kind": "{user_table.KIND}", "entries": []}}')
        patching.setattr(choice, "TABLE", {})
        forget()
        try:
            yield patching
        finally:
            patching.undo()
            forget()


FASTER = {"unfused": 1.5, "separate": 1.0, "gram": 1.2}  # what calls take, for `told`
STEPS = 40  # more than any trial here takes


def block(seed: int = 0) -> nn.Module:
    """A bottleneck in float64: what the reference computes is exact there but for rounding."""
    torch.manual_seed(seed)
    return Bottleneck(32, 8).double()


def x_for(batch: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 32, 6, 6, dtype=torch.float64, generator=generator)


def row(model: nn.Module) -> BlockReport:
    """The last block of the report."""
    return fusedres.report(model).matched[-1]


def without_proof(patching: pytest.MonkeyPatch) -> None:
    """The reference is on trial too, which is right by definition."""
    patching.setattr(on_block, "is_untried", lambda *args: True)
    patching.setattr(proof, "prove", lambda *args: None)
    patching.setattr(proof, "is_known", lambda *args: True)


def told(
    patching: pytest.MonkeyPatch,
    seconds_of: Callable[[str], float],
    whole: Callable[[bool], float] = lambda fused: 1.0 if fused else 1.5,
) -> None:
    """Every call takes what `seconds_of` says of its way to run, every step of the model what `whole` says."""

    def tell_trial(self: Trial, ticket: Ticket, seconds: float) -> None:
        trial_tell(self, ticket, seconds_of(ticket.arm))

    def tell_comparison(self: Comparison, step: Step, seconds: float) -> None:
        comparison_tell(self, step, whole(step.fused))

    patching.setattr(Trial, "tell", tell_trial)
    patching.setattr(Comparison, "tell", tell_comparison)
