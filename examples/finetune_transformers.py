"""Finetunes a ResNet of transformers: its norms stay in evaluation mode, and the head is new.

python examples/finetune_transformers.py
python examples/finetune_transformers.py --weights microsoft/resnet-50   # downloads them
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import fusedres


def build(weights: str | None) -> nn.Module:
    if weights is not None:
        return ResNetForImageClassification.from_pretrained(
            weights, num_labels=10, ignore_mismatched_sizes=True
        )
    return ResNetForImageClassification(ResNetConfig(num_labels=10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="a name or folder for from_pretrained; random weights without")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--recipe", default="auto", choices=("auto", "separate", "gram"))
    options = parser.parse_args()

    torch.manual_seed(0)
    model = fusedres.patch(
        build(options.weights).to(memory_format=torch.channels_last), recipe=options.recipe
    )
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # the blocks follow: each call reads the modes of its norms
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (options.batch,))
    for step in range(options.steps):
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")
    print(fusedres.report(model))


if __name__ == "__main__":
    main()
