"""Inference: a patched model is warmed up and then timed, request by request.

python examples/serve.py --model resnet50 --batch 16
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import fusedres


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", choices=fusedres.models.MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--recipe", default="auto", choices=("auto", "separate", "gram"))
    options = parser.parse_args()

    model = fusedres.models.create(options.model).to(memory_format=torch.channels_last).eval()
    fusedres.patch(model, recipe=options.recipe)
    images = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=torch.channels_last)
    with torch.no_grad():
        fusedres.warmup(model, images)  # on a GPU nothing compiles in the first request then

    seconds = []
    with torch.inference_mode():
        for _ in range(options.requests):
            start = time.perf_counter()
            model(images)
            seconds.append(time.perf_counter() - start)
    print(f"{statistics.median(seconds) * 1e3:.1f} ms a request of {options.batch} images, by the median")
    print(fusedres.report(model))


if __name__ == "__main__":
    main()
