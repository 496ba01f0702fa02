"""`--device`: which devices this machine has, and a model and its images put onto one."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

FORM = re.compile(r"auto|cpu|cuda(?::(\d+))?")
CPU_INSTEAD = "or leave it at --device cpu"


class DeviceError(ValueError):
    """A device that is not here, or a name that stands for none."""


def found() -> str:
    """The devices that torch can use here, in words."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])


def why_no_gpu() -> str:
    """What is there instead of a GPU, what is needed, and how to get it."""
    if not torch.backends.cuda.is_built():
        return (
            f"found torch {torch.__version__}, which is built without CUDA; needed a GPU and a torch with CUDA: "
            f"install that one (https://pytorch.org/get-started), {CPU_INSTEAD}"
        )
    return (
        f"found no GPU that torch {torch.__version__} can use; needed one, and its driver: see what `nvidia-smi` "
        f"says, {CPU_INSTEAD}"
    )


def find(name: str) -> torch.device:
    """The device of that name; `auto`: a GPU if there is one.

    Raises:
        DeviceError: the name stands for no device, or for one that is not here.
    """
    form = FORM.fullmatch(name)
    if form is None:
        raise DeviceError(
            f"--device {name!r} is no device that this command knows: found {found()} here; "
            "needed auto, cpu, cuda or cuda:N: choose one of them"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(f"--device {name!r} is not here: {why_no_gpu()}")
    count = torch.cuda.device_count()
    if int(form.group(1) or 0) >= count:
        raise DeviceError(
            f"--device {name!r} is not here: found {found()}; needed a GPU of that number: "
            f"choose cuda:0 to cuda:{count - 1}, {CPU_INSTEAD}"
        )
    return torch.device(name)


def put(network: nn.Module, images: Tensor, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Both on the device and channels_last.

    Raises:
        DeviceError: the device does not take them, as where its memory is full.
    """
    layout = torch.channels_last
    try:
        network.to(device)
        return (
            network.to(memory_format=layout),  # type: ignore[call-overload]
            images.to(device).to(memory_format=layout),
        )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise DeviceError(
            f"--device {str(device)!r} does not take the model and its images: {reason}; "
            f"free its memory, lower --batch or --size, {CPU_INSTEAD}"
        ) from error


def layout_name(tensors: list[Tensor]) -> str:
    """The memory layout of the tensors [N, C, H, W] among these, in words: of a 1x1 kernel both would be true."""
    told = [t for t in tensors if t.dim() == 4 and t.shape[1] > 1 and t.shape[2:].numel() > 1]
    last = [t.is_contiguous(memory_format=torch.channels_last) for t in told]
    if all(last):
        return "channels_last"
    return "partly channels_last, partly NCHW" if any(last) else "NCHW"
