"""What a training step asks of the host on a GPU's path: raw ops, launches and operators are those of the table."""

import json
import subprocess
import sys

import host_counts
import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, "-W", "ignore", host_counts.__file__, "--print"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


def test_counts_are_those_of_the_table(found):
    table = json.loads(host_counts.TABLE.read_text())
    assert found == table, "run `python tests/support/host_counts.py` and look at what changed"


def test_a_patched_step_has_fewer_operators_than_eager(found):
    for by_case in found.values():
        eager = by_case["eager"]["operators"]
        for case, counts in by_case.items():
            if case == "eager":
                assert not counts["raw_ops"] and not counts["triton_launches"]
            else:
                assert counts["operators"] < eager


def test_each_convolution_has_its_statistics_once(found):
    """53 in ResNet-50: gram's 16 last of a block come from moments of their inputs."""
    for case, counts in found["resnet50"].items():
        raw_ops = counts["raw_ops"]
        assert case == "eager" or raw_ops["bn_stats"] + raw_ops.get("gram_output_stats", 0) == 53, case
