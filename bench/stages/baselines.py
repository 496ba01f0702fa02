"""ResNet-50 without fusedres: eager and torch.compile, training and inference; what a step launches."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from report import Cell, Settings
from stages.steps import profile_step, step_cells
from workloads import BASELINE, COMPILE_OPTIONS, EAGER, Workload

QUICK = (*EAGER, "torch_compile", "torch_compile_graph")
AUTOTUNED = tuple(name for name in COMPILE_OPTIONS if name not in QUICK)  # minutes each: last


def cells(settings: Settings) -> list[Cell]:
    make = partial(Workload, device=settings.device)
    if not settings.full:
        tiny = [make("cifar_resnet20", phase, 2, torch.float32) for phase in ("train", "infer")]
        return [
            *step_cells(settings, tiny, EAGER),
            *step_cells(settings, [make("basic_identity_4", "infer", 1, torch.float32)], ("torch_compile",)),
            Cell(f"profile/{tiny[0].name}", partial(profile_step, settings, tiny[0], BASELINE)),
        ]
    workloads = [
        make("resnet50", phase, batch, dtype)
        for dtype, batch, phase in product((torch.bfloat16, torch.float16), (256, 32), ("train", "infer"))
    ]
    profiled = [w for w in workloads if w.batch == 256]
    return [
        *step_cells(settings, workloads[:1], QUICK),
        *(Cell(f"profile/{w.name}", partial(profile_step, settings, w, BASELINE)) for w in profiled),
        *step_cells(settings, workloads[1:], QUICK),
        *step_cells(settings, workloads, AUTOTUNED),
    ]
