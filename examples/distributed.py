"""One training step on every process, with DistributedDataParallel or FSDP2.

torchrun --nproc-per-node 2 examples/distributed.py
torchrun --nproc-per-node 2 examples/distributed.py --fsdp
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedres


def shard(model: nn.Module) -> nn.Module:
    """In the default layout: fully_shard refuses the weights of a channels_last model, which are not contiguous."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", choices=("resnet18", "resnet34", "resnet50"))
    parser.add_argument("--batch", type=int, default=4, help="images of each process")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--recipe", default="auto", choices=("auto", "separate", "gram"))
    parser.add_argument("--fsdp", action="store_true")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = fusedres.models.create(options.model, num_classes=10)
    fusedres.patch(model, recipe=options.recipe, channels_last=not options.fsdp)
    parallel = shard if options.fsdp else DistributedDataParallel
    wrapped = parallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)

    torch.manual_seed(1 + dist.get_rank())
    images = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=torch.channels_last)
    loss = nn.functional.cross_entropy(wrapped(images), torch.randint(10, (options.batch,)))
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0:
        print(fusedres.report(model))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
