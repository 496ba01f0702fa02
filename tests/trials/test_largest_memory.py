"""The largest memory of a step while its blocks are on trial: never more than the unpatched model's."""

import copy
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from trials_on import told, trials_on, without_proof

import fusedres
from fusedres.models import BasicBlock, Bottleneck
from fusedres.ops.native import library

pytestmark = pytest.mark.skipif(not library.is_usable(), reason="the compiled kernels are not there")


def largest_memory(model, x, folder):
    """Bytes of torch's allocator at their most, above those before a forward and a backward."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        y = model(x)
        y.backward(torch.ones_like(y))
    profiled.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    memory = [event["args"] for event in events if event.get("name") == "[memory]"]
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    return max(event["Total Allocated"] for event in memory) - before


@pytest.mark.parametrize(
    "build, channels", [(lambda: BasicBlock(64, 64), 64), (lambda: Bottleneck(256, 64), 256)]
)
def test_the_largest_memory_of_a_step(tmp_path, build, channels):
    torch.manual_seed(0)
    plain = build().to(memory_format=torch.channels_last)
    x = torch.randn(4, channels, 28, 28).contiguous(memory_format=torch.channels_last).requires_grad_()

    def step(model):
        model.zero_grad()
        x.grad = None
        return largest_memory(model, x, tmp_path)

    step(plain)
    unpatched = step(plain)
    with trials_on(tmp_path) as patching:
        without_proof(patching)
        told(patching, {"unfused": 1.1, "separate": 1.0, "gram": 1.05}.__getitem__)
        model, seen = fusedres.patch(copy.deepcopy(plain)), {}
        for _ in range(7):
            found = step(model)
            (row,) = fusedres.report(model).matched
            assert row.code.startswith("measuring")
            seen.setdefault(row.runs_as, []).append(found)
    assert len(seen) > 1 and max(seen.pop("unfused")) == unpatched
    assert max(max(found) for found in seen.values()) <= unpatched
