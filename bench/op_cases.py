"""Every raw op once, which is what compute-sanitizer and ncu are pointed at.

    python bench/op_cases.py [--device cuda] [--backend NAME] [--only REGEX] [--stage 1..4 --batch N]

Arguments are those of `fusedres.ops.cases`; without --stage at a few small shapes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from layers import STAGE_SIDES, STAGE_WIDTHS

from fusedres.ops import selftest
from fusedres.ops.cases import SMALL, Shape, cases
from fusedres.ops.contract import RawOp, op_name
from fusedres.ops.dispatch import AUTO, LOADERS


def resnet_shape(stage: int, batch: int) -> Shape:
    width = STAGE_WIDTHS[stage - 1]
    return Shape(batch, STAGE_SIDES[stage - 1], width, 4 * width)


def checked_bytes(op: RawOp, found: Any) -> int:
    """Bytes that arguments and results of a call hold. Raises AssertionError if the results are wrong."""
    wrong = selftest.problem(op, found)
    if wrong is not None:
        raise AssertionError(f"{op_name(type(op))}: {wrong}")
    return sum(t.numel() * t.element_size() for t in selftest.tensors((op, found)))


@contextmanager
def profiled(device: str) -> Iterator[None]:
    """What a profiler that does not start by itself sees; errors of kernels surface at its end."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=(AUTO, *LOADERS), default=AUTO, help="default: each in turn")
    parser.add_argument("--only", default="", help="regular expression on case names")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3, 4))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--shapes", type=int, default=len(SMALL), help="so many of the small shapes, the last"
    )
    parser.add_argument("--without", choices=tuple(LOADERS), help="a backend to leave out")
    args = parser.parse_args()
    shapes = [resnet_shape(args.stage, args.batch)] if args.stage else SMALL[-args.shapes :]
    backends = [name for name in LOADERS if name != args.without] if args.backend == AUTO else [args.backend]
    for shape in shapes:
        for case in cases(shape, getattr(torch, args.dtype), torch.device(args.device)):
            for backend in (LOADERS[b]() for b in backends):
                if re.search(args.only, case.name) and backend.reason(case.op) is None:
                    with profiled(args.device):
                        backend(case.op)
                    print(f"{backend.name:10} {case.name:40} {shape}", flush=True)


if __name__ == "__main__":
    main()
