"""Whole models, patched: every recipe against eager and torch.compile, alone, in CUDA graphs and in both."""

from __future__ import annotations

from functools import partial

import torch
from report import Cell, Settings
from stages.steps import profile_step, step_cells
from workloads import COMPILED_RECIPES, FUSEDRES, GRAPHED, Workload

STEP_GRAPHS = tuple(f"{name}_graph" for name in FUSEDRES)
ALL = (*FUSEDRES, *STEP_GRAPHS, *GRAPHED, *COMPILED_RECIPES, "torch_compile")
BATCHES = {"resnet50": (256, 32), "resnet18": (256, 32), "cifar_resnet20": (1024, 128)}


def cells(settings: Settings) -> list[Cell]:
    make = partial(Workload, device=settings.device)
    if not settings.full:
        tiny = [make("cifar_resnet20", phase, 2, torch.float32) for phase in ("train", "infer")]
        return step_cells(settings, tiny, (*FUSEDRES, *STEP_GRAPHS[:1]))
    headline = make("resnet50", "train", 256, torch.bfloat16)
    found = step_cells(settings, [headline], ALL)
    found.append(Cell(f"profile/{headline.name}", partial(profile_step, settings, headline, FUSEDRES[0])))
    rest = [
        make(model, phase, batch, dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for model, batches in BATCHES.items()
        for batch in batches
        for phase in ("train", "infer")
    ]
    return found + step_cells(settings, [w for w in rest if w != headline], ALL)
