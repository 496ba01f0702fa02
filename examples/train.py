"""Trains a ResNet on random images, unpatched and patched from the same weights, and compares losses and time.

python examples/train.py --model resnet50 --batch 16 --size 224 --steps 5
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import nn

import fusedres


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int, amp: bool) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(steps):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", choices=fusedres.models.MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--recipe", default="auto", choices=("auto", "separate", "gram"))
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    plain = fusedres.models.create(options.model, num_classes=10).to(options.device)
    plain = plain.to(memory_format=torch.channels_last)
    patched = fusedres.patch(copy.deepcopy(plain), recipe=options.recipe)
    images = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (options.batch,), device=options.device)

    for name, model in (("unpatched", plain), ("patched", patched)):
        start = time.perf_counter()
        losses = train(model, images, labels, options.steps, options.amp)
        seconds = time.perf_counter() - start
        print(f"{name:9}  {seconds:6.2f} s  losses {' '.join(f'{loss:.4f}' for loss in losses)}")
    print(fusedres.report(patched))


if __name__ == "__main__":
    main()
