"""One residual block of every kind and stage, in every recipe, against eager and torch.compile."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from report import Cell, Settings
from stages.steps import step_cells
from workloads import FUSEDRES, Workload

IMPLEMENTATIONS = ("torch_compile", *FUSEDRES)


def cells(settings: Settings) -> list[Cell]:
    make = partial(Workload, device=settings.device)
    if not settings.full:
        tiny = [make("bottleneck_projection_4", phase, 1, torch.float32) for phase in ("train", "infer")]
        return step_cells(settings, tiny, FUSEDRES)
    kinds = ("bottleneck_identity", "bottleneck_projection", "basic_identity", "basic_projection")
    order = product((256, 32), kinds, (1, 2, 3, 4), ("train", "infer"))
    workloads = [make(f"{k}_{stage}", phase, batch, torch.bfloat16) for batch, k, stage, phase in order]
    return step_cells(settings, workloads, IMPLEMENTATIONS)
