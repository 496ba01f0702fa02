"""What time it is on a device: stamps that are taken now and read later, without waiting for the device."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Of one device."""

    def stamp(self) -> Any:
        """The point of time at which all that was asked of the device so far is done."""

    def seconds(self, start: Any, end: Any) -> float | None:
        """Between two stamps; None where the device has not come to the second one."""


class HostClock:
    """Of a CPU, whose operations are done when they return."""

    def stamp(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Of a GPU's current stream, by events that are asked and never waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # which need not be the current device's
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        return start.elapsed_time(end) / 1e3 if end.query() else None


HOST: Clock = HostClock()


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HOST
