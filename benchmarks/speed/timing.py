"""Times that can be compared on noisy computers: interleaved repeats, the smallest of each, every figure a ratio."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from apm_hf.runs.provenance import commit, versions

Calls = dict[str, Callable[[], object]]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
CPU_FACTS = Path("/proc/cpuinfo")
TURN = 0.02  # s; a call shorter than that runs several times a turn, lest it only find others' data in the cache


@dataclass(frozen=True)
class Goal:
    """A bound that a ratio must keep: at most, or at least."""

    name: str
    value: float
    bound: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


@dataclass
class Table:
    """One table of the page."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    text: str = ""


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def label_of(what: str, device: torch.device, dtype: torch.dtype) -> str:
    return f"{what}, {device.type}, {str(dtype).removeprefix('torch.')}"


def smallest_times(calls: Calls, repeats: int, device: torch.device) -> dict[str, float]:
    """Return seconds of each, the smallest of interleaved repeats; one more, before them, warms up."""
    smallest = dict.fromkeys(calls, float("inf"))
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            times = []
            while sum(times) < TURN:
                _wait(device)
                started = time.perf_counter()
                call()
                _wait(device)
                times.append(time.perf_counter() - started)
            if repeat:
                smallest[name] = min(smallest[name], *times)
    return smallest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_equal(name: str, actual: Tensor, expected: Tensor, *, slack: float = 1.0) -> None:
    """Raise where outputs differ: they are not timed.

    Args:
        slack: times the tolerance, for what went through longer sums.

    Raises:
        ValueError: where the relative error is above 1e-5 in float32, 5e-2 in bfloat16.
    """
    error = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
    tolerance = slack * TOLERANCE[expected.dtype]
    if not error <= tolerance:
        raise ValueError(f"{name}: expected the rival's outputs to {tolerance:g}, got an error of {error:g}")


def has_amx() -> bool:
    """Return whether this CPU has Intel's matrix unit."""
    return CPU_FACTS.exists() and "amx_tile" in CPU_FACTS.read_text()


def computer_facts() -> dict[str, str]:
    """Return everything that a figure depends on, as a person names it."""
    model = platform.machine()
    if CPU_FACTS.exists():
        lines = CPU_FACTS.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    facts = {
        "commit": commit() or "unknown",
        "CPU": f"{model} ({platform.machine()}), {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
    }
    return facts
