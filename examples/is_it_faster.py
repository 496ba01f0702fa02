"""Is a patched model right, and is it faster here? Verifies, compares, and with --tune measures every recipe.

python examples/is_it_faster.py --model resnet50 --batch 16 --size 224
"""

from __future__ import annotations

import argparse

import torch

import fusedres
from fusedres.measuring.tune import tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", choices=fusedres.models.MODELS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recipe", default="auto", choices=("auto", "separate", "gram"))
    parser.add_argument("--tune", action="store_true", help="`fusedres tune` keeps what this only prints")
    options = parser.parse_args()

    model = fusedres.models.create(options.model).to(memory_format=torch.channels_last)
    images = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=torch.channels_last)
    print(fusedres.verify(model, images, recipes="separate"))
    print(fusedres.compare(model, images, recipe=options.recipe, rounds=options.rounds))
    if options.tune:
        for found in tune(model, images, rounds=options.rounds):
            print(f"{found.entry.recipe:9} {found.entry.ratio:5.2f}x  {', '.join(found.blocks)}")


if __name__ == "__main__":
    main()
