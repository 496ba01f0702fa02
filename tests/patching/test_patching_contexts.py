"""patch and report under modes of torch, and on a model that fully_shard took over."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

import fusedres
from fusedres.models import cifar_resnet


@pytest.mark.parametrize("built_inside", [True, False], ids=["built-inside", "built-outside"])
def test_patching_under_fake_tensors(built_inside):
    model = cifar_resnet(20)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = cifar_resnet(20) if built_inside else model
        fusedres.patch(model, recipe="separate", strict=True)
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    assert len(fusedres.report(model).matched) == 10


def test_dry_runs_are_not_counted_as_the_callers_operations():
    with FlopCounterMode(display=False) as counter:
        fusedres.patch(cifar_resnet(20), strict=True)
    assert counter.get_total_flops() == 0


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])
def test_the_report_of_a_sharded_model(mesh, patched):
    model = cifar_resnet(20)
    if patched:
        fusedres.patch(model, recipe="separate", exclude="layer1.0")
    for part in (model.layer1[0], model.layer2[0], model):
        fully_shard(part, mesh=mesh)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    report = fusedres.report(model)
    assert len(report.blocks) == 10 and len(report.matched) == (9 if patched else 0)
    assert {row.runs_as for row in report.matched} == ({"separate"} if patched else set())
    with pytest.raises(fusedres.UnsupportedModelError, match="sharded by fully_shard"):
        fusedres.patch(model)
