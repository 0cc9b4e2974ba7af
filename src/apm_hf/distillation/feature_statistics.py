"""Measure mean and standard deviation of a teacher's features in a first pass over some images.

Teachers differ in scale by orders of magnitude; Theia (arXiv:2407.20179) standardises every channel, PHI-S
(arXiv:2410.01680) compares that with one deviation for all channels, which keeps cosines as they are.

Legend: M rows, F feature width.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..configuration_apm import APMConfig
from ..modeling_apm import APMModel

logger = logging.get_logger(__name__)

KINDS = ("channel", "scalar")
# A channel that hardly varies would count most of all: no deviation is taken for less than this share of the mean one.
SMALLEST_SHARE = 1e-3


class RunningStatistics:
    """Accumulate mean and variance per channel over batches of rows, in float64.

    Batches are merged by their counts, means and squared deviations (Chan, Golub & LeVeque, 1979): the difference of
    large sums never occurs.
    """

    def __init__(self, feature_size: int) -> None:
        self.count = 0.0
        self.mean, self.squares = torch.zeros(2, feature_size, dtype=torch.float64).unbind()

    def add(self, rows: Tensor) -> None:
        """Add rows `(..., F)`, from any device."""
        device = "cpu" if rows.device.type == "mps" else rows.device  # which has no float64
        rows = rows.detach().flatten(0, -2).to(device, torch.float64)
        variance, mean = torch.var_mean(rows, dim=0, correction=0)
        self._merge(float(len(rows)), mean.cpu(), variance.cpu() * len(rows))

    def merged(self, gather: Callable[[Tensor], Tensor]) -> "RunningStatistics":
        """Return the statistics of all processes' rows together, the same in each process.

        Args:
            gather: `(1, N)` of every process -> `(processes, N)`; see `Accelerator.gather`.
        """
        packed = torch.cat([torch.tensor([self.count], dtype=torch.float64), self.mean, self.squares])
        whole = RunningStatistics(len(self.mean))
        for part in gather(packed[None]).cpu():
            mean, squares = part[1:].chunk(2)
            whole._merge(part[0].item(), mean, squares)
        return whole

    def result(self, kind: str = "channel") -> tuple[Tensor, Tensor]:
        """Return mean `(F,)` and deviation: `(F,)` or, for `"scalar"`, `()`, the root of the channels' mean variance.

        Raises:
            ValueError: for an unknown kind, for no rows, or where they are all the same.
        """
        if kind not in KINDS:
            raise ValueError(f"statistics: expected one of {list(KINDS)}, got {kind!r}")
        if not self.count:
            raise ValueError("statistics: expected at least one image, got none")
        variance = self.squares / self.count
        common = variance.mean().sqrt()
        if not (common > 0 and torch.isfinite(common)):
            raise ValueError(f"statistics: expected features that vary, got a standard deviation of {common.item()}")
        return self.mean, common if kind == "scalar" else variance.sqrt().clamp(min=SMALLEST_SHARE * common.item())

    def _merge(self, count: float, mean: Tensor, squares: Tensor) -> None:
        if not count:
            return
        total, difference = self.count + count, mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squares = self.squares + squares + difference.square() * (self.count * count / total)
        self.count = total


def set_statistics(
    student: APMModel, features: Iterable[Mapping[str, Tensor]], *, kind: str, gather: Callable[[Tensor], Tensor]
) -> None:
    """Measure the features of heads that have no statistics, and put them into the student.

    Args:
        features: of every batch, the teachers' features `(..., F)` by head, the main one's under the empty name; every
            process sees a part of the images.
        kind: see [`RunningStatistics.result`].
        gather: see [`RunningStatistics.merged`].
    """
    fields = {name: student.config.teacher_head(name) for name in ("", *(student.config.teacher_heads or {}))}
    running = {
        name: RunningStatistics(head["feature_size"]) for name, head in fields.items() if head["feature_mean"] is None
    }
    if not running:
        return
    for batch in features:
        for name in running.keys() & batch.keys():
            running[name].add(batch[name])
    for name, statistics in running.items():
        whole = statistics.merged(gather)
        if whole.count:  # else it has no teacher in this run
            mean, std = whole.result(kind)
            student.set_feature_statistics(mean, std, head=name)
            logger.info(f"{name or 'teacher'}: features' mean deviation is {std.mean().item():.4g}")


def statistics_of(config: APMConfig) -> dict[str, dict[str, Any]]:
    """Return the arguments of `set_feature_statistics` as JSON, by head; heads without statistics are left out."""
    fields = {name: config.teacher_head(name) for name in ("", *(config.teacher_heads or {}))}
    return {
        name: {"mean": head["feature_mean"], "std": head["feature_std"]}
        for name, head in fields.items()
        if head["feature_mean"] is not None
    }
