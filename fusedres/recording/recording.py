"""One recording of a pass, which the native library keeps and runs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fusedres.ops.native import from_python
from fusedres.ops.native.from_python import ReplayBlock
from fusedres.recording.bundle import Bundle
from fusedres.recording.code import NONE


class Recording:
    """One, kept by the native library as long as this lives."""

    def __init__(self, number: int, slots: list[int], inputs: int, versioned: list[int], first: int) -> None:
        self.number, self.first_mutation = number, first
        weakref.finalize(self, torch.ops.fusedres_native.recording_drop, number).atexit = False
        self._replay = torch.ops.fusedres_native.replay.default
        self.versioned = versioned  # inputs of which autograd is told that they were written into
        self.note: Any = None
        self.kernels: list[Any] = []  # which are loaded as long as somebody holds them
        self.times = 0  # that it has served
        made = {slot: i for i, slot in enumerate(sorted({s for s in slots if s >= inputs}))}
        # of each output: the index of None, of a tensor that was made, or of an input, one behind the other
        self.outputs = [0 if s < 0 else 1 + made[s] if s >= inputs else 1 + len(made) + s for s in slots]
        self.furthest = max(self.outputs, default=0)
        first_output, *others = slots or [NONE]
        self.kept = tuple([s >= 0 for s in others])  # of the results, in a bundle
        # in a bundle an output would keep the graph alive that keeps the bundle, and an input is somebody else's
        is_ours = all(s == NONE or s >= inputs for s in others)
        self.may_keep = is_ours and first_output >= inputs and first_output not in others

    def run(
        self, inputs: list[Tensor], bundle: Bundle | None = None, keeps: bool = False, is_direct: bool = False
    ) -> list[Any] | None:
        """The results; None where the inputs are of another form.

        Args:
            bundle, keeps: as of `replays.run`; is_direct: past torch's dispatcher.
        """
        keeps = keeps and self.may_keep
        replay = (is_direct and from_python.replay()) or self._replay
        made, number = replay(self.number, inputs, 0 if bundle is None else bundle.number, keeps)
        return self._results(made, number, inputs, bundle, keeps) if made else None

    def run_block(
        self, replay: ReplayBlock, call: tuple[Any, ...], block: nn.Module, x: Tensor, keeps: bool
    ) -> tuple[list[Any], list[Any]] | None:
        """The results of a bound call, and what its watch read; None where the call is another one.

        Args:
            replay: of `from_python`; call: as fusedres/patching/bound.py describes it.
        """
        keeps = keeps and self.may_keep
        found = replay(call, block, x, keeps)
        if found is None or not found[0]:
            return None
        made, number, inputs, read = found
        return self._results(made, number, inputs, None, keeps), read

    def _results(
        self, made: list[Tensor], number: int, inputs: list[Tensor], bundle: Bundle | None, keeps: bool
    ) -> list[Any]:
        if self.versioned:
            increment_version([inputs[slot] for slot in self.versioned if slot < len(inputs)])
        if keeps:
            return [*made, Bundle(number, self.kept)]
        known = [None, *made, *inputs]
        if bundle is not None and self.furthest >= len(known):
            known += [t for t in bundle.tensors() if t is not None]
        return [*map(known.__getitem__, self.outputs)]
