"""`fusedres explain MODEL`: the residual blocks of a model, and what each runs as on a given input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedres.cli.devices import layout_name
from fusedres.ops.dispatch import dispatcher
from fusedres.ops.native import library, winograd
from fusedres.patching import api
from fusedres.patching.reasons import describe
from fusedres.patching.report import BlockReport, PatchReport
from fusedres.text_table import section

PHASES = {"training": True, "inference": False}
Calls = dict[str, PatchReport]  # by phase


def title(name: str, network: nn.Module, images: Tensor) -> str:
    """What is explained: the model, its input [N, 3, H, W] if there is any, the memory layout of each."""
    model = f"{name}, model {layout_name(list(network.parameters()))}"
    if not len(images):
        return model
    return f"{model}, input {' x '.join(map(str, images.shape))} {layout_name([images])}"


def dry_report(network: nn.Module, recipe: str, accuracy: str) -> PatchReport:
    """What patch would do to the model. Raises as `fusedres.patch`, and for an absent backend as a call would."""
    dispatcher()
    return api.report(api.patch(network, recipe=recipe, accuracy=accuracy, dry_run=True))


def convolutions(accuracy: str) -> str | None:
    """How 3x3 convolutions run in a fused block on the CPU; None without the kernels for them."""
    if not any(backend.name == library.NAME for backend in dispatcher().backends):
        return None
    return winograd.described(accuracy == "strict")


def call(network: nn.Module, images: Tensor, recipe: str, accuracy: str) -> Calls:
    """Patches the model and runs one forward of each phase; what every block ran as. Raises as `fusedres.patch`."""
    api.patch(network, recipe=recipe, accuracy=accuracy)
    reports = {}
    for phase, training in PHASES.items():
        with torch.set_grad_enabled(training):
            network.train(training)(images)
        reports[phase] = api.report(network)
    return reports


def outcome(block: BlockReport) -> str:
    """What a patched block ran as, with the code of the reason where it is not what was asked for."""
    return f"{block.runs_as}" + (f" [{block.code}]" if block.code else "")


def text(title: str, report: PatchReport, calls: Calls, convolutions: str | None) -> str:
    """One line a block, its name first; below, once, what each code in it means, and how convolutions run."""
    rows = [("block", "class", "form", *(calls or ("patched",)))]
    codes = [block.code for block in report.skipped]
    for place, block in enumerate(report.blocks):
        called = [found.blocks[place] for found in calls.values()]
        if not block.matched:
            cells = [f"left alone [{block.code}]", *[""] * (len(called) - 1)]
        else:
            cells = [outcome(c) for c in called] or ["yes"]
            codes += [c.code for c in called]
        rows.append((block.name, block.class_name, block.form, *cells))
    heads = dict.fromkeys(code.partition(":")[0] for code in codes if code)
    meanings = [f"{head}: {describe(head)}" for head in heads]
    below = meanings if convolutions is None else [*meanings, convolutions]
    return section(title, rows, f"matched {len(report.matched)} of {len(report.blocks)} blocks", *below)
