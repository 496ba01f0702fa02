"""torch.compile on a patched model, held against the same model in eager mode.

python examples/compiled.py --recipe separate
"""

from __future__ import annotations

import argparse

import torch

import fusedres


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", choices=fusedres.models.MODELS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument(
        "--recipe",
        default="auto",
        choices=("auto", "separate", "gram"),
        help="auto leaves the blocks to the compiler",
    )
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = fusedres.models.create(options.model).to(memory_format=torch.channels_last)
    fusedres.patch(model.eval(), recipe=options.recipe)  # first patch, then compile
    images = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=torch.channels_last)
    compiled = torch.compile(model, backend=options.compiler, fullgraph=True)
    with torch.no_grad():
        eager, found = model(images), compiled(images)
    distance = ((found - eager).norm() / eager.norm()).item()
    print(f"compiled with {options.compiler}; relative distance from eager {distance:.1e}")


if __name__ == "__main__":
    main()
