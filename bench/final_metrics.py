"""Whether a patched model trains as well: accuracies after training from several seeds, unpatched and patched.

    python bench/final_metrics.py [--seeds 5] [--epochs 6] > final_metrics.json

A ResNet-20 on the 8 x 8 digits of scikit-learn, enlarged to 16 x 16, in float32 on the CPU. The runs of a seed see the
same images in the same order; what sets them apart is rounding, so their accuracies scatter like those of two seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import fusedres
from fusedres.models import cifar_resnet

RUNS: dict[str, dict[str, Any] | None] = {
    "unpatched": None,
    "patched": {"recipe": "separate"},
    "patched, strict": {"recipe": "separate", "accuracy": "strict"},
}
TESTED = 360  # images, of 1797
BATCH = 64


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 16, 16] in channels_last and their labels, shuffled."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    large = F.interpolate(images[order], scale_factor=2, mode="bilinear")
    return large.contiguous(memory_format=torch.channels_last), torch.tensor(found.target)[order]


def train(seed: int, epochs: int, options: dict[str, Any] | None) -> dict[str, float]:
    """The last epoch's mean loss, and the accuracy on images that were not trained on."""
    images, labels = digits()
    torch.manual_seed(seed)
    model = cifar_resnet(20, in_channels=1).to(memory_format=torch.channels_last)
    if options is not None:
        fusedres.patch(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    losses: list[float] = []
    for _ in range(epochs):
        losses = []
        for at in torch.randperm(len(images) - TESTED).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[TESTED + at]), labels[TESTED + at])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
    with torch.no_grad():
        right = model.eval()(images[:TESTED]).argmax(1) == labels[:TESTED]
    return {"loss": statistics.mean(losses), "accuracy": right.float().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), **vars(options)}
    for name, patched in RUNS.items():
        runs = [train(seed, options.epochs, patched) for seed in range(options.seeds)]
        accuracies = [run["accuracy"] for run in runs]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        found[name] = {"runs": runs, "accuracy": statistics.mean(accuracies), "spread": spread}
        print(f"{name}: accuracy {statistics.mean(accuracies):.4f}, spread {spread:.4f}", file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
