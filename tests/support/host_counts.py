"""Raw ops, launches of Triton kernels and torch's operators of a training step on the stand-in GPU, beside a table.

    python tests/support/host_counts.py    writes the table anew, once a change of it was looked at

Nothing is compiled. Run as a script, in a process of its own: the stand-in changes it for good.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

TABLE = Path(__file__).with_suffix(".json")


def measure() -> dict[str, dict[str, dict[str, object]]]:
    import gpu_stand_in
    from gpu_stand_in import steps

    from fusedres.ops import triton_reasons

    gpu_stand_in.stand_in_for_decisions()
    triton_reasons._usable[torch.device("cpu")] = None  # nothing can be probed
    return {
        network: {name: counts._asdict() for name, counts in by_case.items()}
        for network, by_case in steps.count_all().items()
    }


if __name__ == "__main__":
    root = Path(__file__).parents[2]
    sys.path[:0] = [str(root), str(root / "bench")]
    text = json.dumps(measure(), indent=1, sort_keys=True) + "\n"
    if sys.argv[1:] == ["--print"]:
        print(text)
    else:
        TABLE.write_text(text)
