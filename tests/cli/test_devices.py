"""`--device`: a wrong or absent one is one line that says what was found, what is needed and how to mend it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fusedres.cli import devices
from fusedres.cli.app import app
from fusedres.cli.devices import DeviceError

COMMANDS = ("explain", "verify", "compare", "tune")


def gpus(monkeypatch, count: int, built: bool = True) -> None:
    """That many GPUs, as torch would tell of them."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("device", ["banana", "cuda", "cuda:7", "mps", ""])
def test_every_command_refuses_it_in_one_line(monkeypatch, command, device):
    gpus(monkeypatch, 0)
    result = CliRunner().invoke(app, [command, "fusedres:cifar_resnet20", "--device", device])
    assert result.exit_code == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"fusedres: --device {device!r} is ")
    assert "found " in line and "needed " in line and "cpu" in line


@pytest.mark.parametrize(
    ("count", "built", "name", "message"),
    [
        (0, False, "cuda", f"found torch {torch.__version__}, which is built without CUDA"),
        (0, True, "cuda:0", "found no GPU that torch .* `nvidia-smi` says"),
        (2, True, "cuda:2", "found cpu, cuda:0, cuda:1; .* choose cuda:0 to cuda:1"),
        (1, True, "cuda:01x", "found cpu, cuda:0 here; needed auto, cpu, cuda or cuda:N"),
    ],
)
def test_what_is_missing_is_told_apart(monkeypatch, count, built, name, message):
    gpus(monkeypatch, count, built)
    with pytest.raises(DeviceError, match=message.replace("+", r"\+")):
        devices.find(name)


def test_auto_is_a_gpu_if_there_is_one(monkeypatch):
    gpus(monkeypatch, 0)
    assert devices.find("auto") == devices.find("cpu") == torch.device("cpu")
    gpus(monkeypatch, 2)
    assert devices.find("auto").type == "cuda" and devices.find("cuda:1") == torch.device("cuda", 1)


def test_a_device_that_is_full_is_explained(monkeypatch):
    def full(self, *to):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more")

    monkeypatch.setattr(nn.Linear, "to", full)
    with pytest.raises(DeviceError, match=r"Tried to allocate 2 GiB\.; free its memory, lower --batch"):
        devices.put(nn.Linear(1, 1), torch.zeros(1), torch.device("cpu"))


def test_layouts_are_told_apart_where_the_shape_tells_them():
    conv, pointwise = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
    weights = [conv.weight, conv.bias, pointwise.weight]
    assert devices.layout_name(weights) == "NCHW"
    conv.to(memory_format=torch.channels_last)
    assert devices.layout_name([conv.weight, *weights[1:]]) == "channels_last"
    assert devices.layout_name([conv.weight, torch.zeros(2, 3, 4, 4)]) == "partly channels_last, partly NCHW"
