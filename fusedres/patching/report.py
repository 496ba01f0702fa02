"""What was matched, what runs, and why not: the report of a model, as an object and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fusedres.patching.reasons import describe
from fusedres.text_table import aligned

PENDING = "no eager call yet"
COLUMNS = ("block", "class", "form", "matched", "runs as", "code")


@dataclass(frozen=True)
class BlockReport:
    """One residual block, or a module that looks like one.

    matched: it is patched (in a dry run: would be). runs_as: the recipe of its last eager call, None before the first;
    calls inside torch.compile leave no note, for a graph cannot hold one.
    code: the stable reason code for not being matched or for not running as `recipe`; see
    `fusedres.patching.reasons.REASONS`.
    trial: of calls that are measured, how far that is ("measuring 3/7"), then how many times as fast as the original
    forward the best recipe was, with its bounds ("1.42x [1.30 1.55]"); None where tables decide.
    """

    name: str
    class_name: str
    form: str
    matched: bool
    recipe: str | None
    backend: str | None
    runs_as: str | None
    code: str | None
    trial: str | None = None

    @property
    def row(self) -> tuple[str, ...]:
        runs_as = (self.runs_as or PENDING) if self.matched else "-"
        if self.trial is not None:
            runs_as += f", {self.trial}"
        why = "" if self.code is None else f"{self.code.partition(':')[0]}: {describe(self.code)}"
        return self.name, self.class_name, self.form, "yes" if self.matched else "no", runs_as, why


@dataclass(frozen=True)
class PatchReport:
    """Every residual block of a model. `print(report)` shows a table; true if any block is matched."""

    blocks: tuple[BlockReport, ...]

    @property
    def matched(self) -> tuple[BlockReport, ...]:
        return tuple(block for block in self.blocks if block.matched)

    @property
    def skipped(self) -> tuple[BlockReport, ...]:
        return tuple(block for block in self.blocks if not block.matched)

    def __bool__(self) -> bool:
        return bool(self.matched)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: {"matched": int, "total": int, "blocks": [...]}."""
        return {
            "matched": len(self.matched),
            "total": len(self.blocks),
            "blocks": [asdict(block) for block in self.blocks],
        }

    def __str__(self) -> str:
        rows = [COLUMNS, *(block.row for block in self.blocks)]
        return "\n".join([*aligned(rows), f"matched {len(self.matched)} of {len(self.blocks)} blocks"])
