"""Measure a run's speed: images per second, memory, the shares of teacher and student, MFU.

MFU is the share of the devices' peak (dense products in 16 bits, as their makers state it) that the products of
teacher and student need (PaLM, arXiv:2204.02311, appendix B). Products are counted once, at the first pass, by
`torch.utils.flop_counter`: the teacher's while it runs, the student's on tensors without content (device `meta`),
forward and backward, without those of a recomputation. A device that is not in the table has no MFU.

Times are taken at marks on the device's own queue (CUDA events), which are read when a report waits for the device
anyway: nothing is synchronised for them.

Legend: B images in a process's pass.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from ..configuration_apm import APMConfig
from ..modeling_apm import APMModel

# TFLOP/s of dense bfloat16 products, from NVIDIA's data sheets (half of what they state "with sparsity"), by what
# `torch.cuda.get_device_name` begins with; the longest that fits counts.
PEAK_TFLOPS = {
    "NVIDIA A100": 312.0,  # https://www.nvidia.com/en-us/data-center/a100/
    "NVIDIA H100 80GB HBM3": 989.4,  # SXM: https://www.nvidia.com/en-us/data-center/h100/
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.0,  # https://resources.nvidia.com/en-us-tensor-core/nvidia-h100-datasheet
    "NVIDIA H200": 989.4,  # https://www.nvidia.com/en-us/data-center/h200/
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA L4": 121.0,  # https://www.nvidia.com/en-us/data-center/l4/
    "NVIDIA L40S": 362.0,  # https://www.nvidia.com/en-us/data-center/l40s/
}
GIB = 2**30


def peak_flops(device_name: str) -> float | None:
    """Return the peak FLOP/s of a device by its name; None for one that is not in the table."""
    words = device_name.replace("-", " ").split()
    fitting = [name for name in PEAK_TFLOPS if words[: len(name.split())] == name.split() and "MIG" not in words]
    return PEAK_TFLOPS[max(fitting, key=len)] * 1e12 if fitting else None


class Recorded:
    """Wrap a student and record the inputs of its last call."""

    def __init__(self, student: Any, config: APMConfig) -> None:
        self.student, self.config = student, config
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        self.call = inputs, options
        return self.student(*inputs, **options)


def student_flops(config: APMConfig, inputs: tuple[Any, ...], options: Mapping[str, Any], used: set[str]) -> int:
    """Count the operations of one forward and backward pass of such a student, without computing it.

    Args:
        inputs, options: of its `forward`; tensors on any device.
        used: fields of the output that the loss reads.
    """
    call = [(name, _shape(value)) for name, value in (*enumerate(inputs), *options.items())]
    return _counted(config.to_json_string(use_diff=False), tuple(call), frozenset(used))


class _Shape(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


def _shape(value: Any) -> Any:
    return _Shape(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


@lru_cache
def _counted(config: str, call: tuple[tuple[int | str, Any], ...], used: frozenset[str]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    def empty(value: Any) -> Any:
        return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, _Shape) else value

    with torch.device("meta"):
        student = APMModel(APMConfig.from_dict(json.loads(config))).train()
    inputs = [empty(value) for name, value in call if isinstance(name, int)]
    options = {name: empty(value) for name, value in call if isinstance(name, str)}
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        outputs = student(*inputs, **options)
        fields = [outputs.get(name) for name in sorted(used)]
        tensors = [tensor for field in fields for tensor in (field.values() if isinstance(field, dict) else [field])]
        sum(tensor.float().sum() for tensor in tensors if tensor is not None).backward()
    return counter.get_total_flops()


class SpeedMeter:
    """Given the course of a training loop, in its order.

    Args:
        device: of this process.
        num_processes: which all take as many images.
        largest: of numbers of all processes the largest, the same in all of them.
        peak: FLOP/s of one device; None looks it up.
    """

    def __init__(
        self,
        device: torch.device,
        num_processes: int,
        *,
        largest: Callable[[float], float] = lambda value: value,
        peak: float | None = None,
    ) -> None:
        self.device, self.num_processes, self.largest = device, num_processes, largest
        self.cuda = device.type == "cuda"
        self.device_name = torch.cuda.get_device_name(device) if self.cuda else device.type
        self.peak, self.peak_from = peak, "given"
        if peak is None:
            self.peak = peak_flops(self.device_name)
            self.peak_from = "data sheet" if self.peak else "unknown"
        self.flops: dict[str, float] = {}  # an image, forward and for the student backward
        self.windows: list[dict[str, float]] = []  # of all reports
        self._marks: dict[str, Any] = {}
        self._counted = False
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        self.begin()

    # --- called by the loop -----------------------------------------------------------------------------------------

    @contextmanager
    def one_pass(self, num_images: int) -> Iterator[None]:
        """Around a forward and backward pass, and the step behind it, of B images in this process."""
        before = self._marks.get("end")
        self._marks = {"before": before, "begin": self._mark()}
        self._pass_images = num_images
        yield
        self._marks["end"] = self._mark()
        self._counted = True
        self._images += num_images * self.num_processes

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Time the teachers' part of a pass; at the first one their products are counted."""
        self._marks["teacher_begin"] = self._mark()
        if self._counted:
            yield
        else:
            from torch.utils.flop_counter import FlopCounterMode

            with FlopCounterMode(display=False) as counter:
                yield
            self.flops["teacher"] = counter.get_total_flops() / self._pass_images
        self._marks["teacher_end"] = self._mark()

    def recorded(self, student: Any, config: APMConfig) -> Any:
        """The student for a pass: at the first one it is watched, for [`count_student`]."""
        return student if self._counted else Recorded(student, config)

    def count_student(self, student: Any, used: set[str]) -> None:
        """Count the products of what [`recorded`] watched; without effect after the first pass."""
        if isinstance(student, Recorded) and student.call is not None:
            inputs, options = student.call
            self.flops["student"] = student_flops(student.config, inputs, options, used) / self._pass_images
            student.call = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training: its time does not count."""
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started
        self._marks = {}  # the next pass does not begin where the last one ended

    def report(self) -> dict[str, float]:
        """Figures since the last report: called by all processes, at a moment that waits for the device anyway.

        Returns:
            `images_per_second` of all processes; `memory_gib`: on CUDA the peak of allocated memory, elsewhere what
            the process holds, of the process that has most; `teacher_share`, `student_share`: of the time of the last
            pass, the rest of which went into reading images; `mfu`, where the peak is known.
        """
        seconds = time.perf_counter() - self._started - self._paused
        values = {"images_per_second": self._images / seconds if seconds > 0 else 0.0}
        used = torch.cuda.max_memory_allocated(self.device) if self.cuda else psutil.Process().memory_info().rss
        values["memory_gib"] = self.largest(used / GIB)
        values |= self._shares()
        if self.peak:
            needed = sum(self.flops.values()) * values["images_per_second"]
            values["mfu"] = needed / (self.peak * self.num_processes)
        self.windows.append(values)
        self.begin()
        return values

    def summary(self) -> dict[str, Any]:
        """Return medians over this start's reports, without the first one, in which things warm up."""
        windows = self.windows[1:] or self.windows
        names = dict.fromkeys(name for window in windows for name in window)
        figures = {name: statistics.median([window[name] for window in windows if name in window]) for name in names}
        if windows:
            figures["memory_gib"] = max(window["memory_gib"] for window in self.windows)
        return {
            "processes": self.num_processes,
            "device": self.device_name,
            "reports": len(windows),
            **figures,
            "flops_per_image": self.flops,
            "flops_from": "torch.utils.flop_counter, first pass",
            "peak_flops": self.peak,
            "peak_from": self.peak_from,
        }

    # --- within -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin to measure the time until the next report."""
        self._started, self._paused, self._images = time.perf_counter(), 0.0, 0

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _shares(self) -> dict[str, float]:
        marks = self._marks
        if marks.get("before") is None or marks.get("end") is None:
            return {}
        if self.cuda:
            marks["end"].synchronize()
        whole = self._between(marks["before"], marks["end"])
        training = self._between(marks["begin"], marks["end"])
        teacher = self._between(marks["teacher_begin"], marks["teacher_end"]) if "teacher_end" in marks else 0.0
        return {"teacher_share": teacher / whole, "student_share": (training - teacher) / whole} if whole > 0 else {}

    def _between(self, first: Any, second: Any) -> float:
        return first.elapsed_time(second) / 1e3 if self.cuda else second - first
