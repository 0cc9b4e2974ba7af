"""What an evaluation consists of: sweeps of benchmarks, corruptions, teachers and seeds, cut into cells.

A cell is one benchmark under one corruption at one severity, with one teacher and one seed; every method of its sweep
predicts the same images of it.
"""

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.corruptions import CORRUPTION_NAMES, EXTRA_CORRUPTION_NAMES
from .methods.task import Method, options_of

CLEAN = "none"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Every combination of these.

    Args:
        benchmarks: names in `apm_hf.evaluation.labels.benchmarks.BENCHMARKS`, `"scenes"`, or folders, files and Hub
            names.
        methods: names in `apm_hf.evaluation.methods.registry.METHODS`.
        teachers: names or folders.
        corruptions: `"none"` for the images as they are, else names in `apm_hf.data.corruptions`.
        severities: 1 to 5, of every corruption but `"none"`.
        seeds: of views, of corruptions' noise and of models' first weights.
        max_images, skip_images: of each benchmark, in an order drawn once and for all, so that one sweep may tune on
            what another does not report.

    Raises:
        ValueError: for something empty or outside its range.
    """

    benchmarks: tuple[str, ...]
    methods: tuple[str, ...]
    teachers: tuple[str, ...]
    corruptions: tuple[str, ...] = (CLEAN,)
    severities: tuple[int, ...] = (3,)
    seeds: tuple[int, ...] = (0,)
    max_images: int | None = None
    skip_images: int = 0

    def __post_init__(self) -> None:
        for name in ("benchmarks", "methods", "teachers", "corruptions", "severities", "seeds"):
            values = getattr(self, name)
            if isinstance(values, str) or not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: expected one or more different values, got {values!r}")
        known = (CLEAN, *CORRUPTION_NAMES, *EXTRA_CORRUPTION_NAMES)
        if unknown := [name for name in self.corruptions if name not in known]:
            raise ValueError(f"corruptions: expected some of {', '.join(known)}, got {', '.join(unknown)}")
        if any(severity not in range(1, 6) for severity in self.severities):
            raise ValueError(f"severities: expected 1 to 5, got {list(self.severities)}")
        if (self.max_images is not None and self.max_images < 1) or self.skip_images < 0:
            raise ValueError(
                f"max_images, skip_images: expected at least 1 and 0, got {self.max_images}, {self.skip_images}"
            )

    def cells(self) -> list["Cell"]:
        """In order, the clean ones first."""
        conditions = [(name, 0) for name in self.corruptions if name == CLEAN]
        conditions += itertools.product((name for name in self.corruptions if name != CLEAN), self.severities)
        return [
            Cell(benchmark, corruption, severity, teacher, seed, self.max_images, self.skip_images, self.methods)
            for teacher in self.teachers
            for benchmark in self.benchmarks
            for seed in self.seeds
            for corruption, severity in conditions
        ]


@dataclass(frozen=True)
class Cell:
    """One benchmark under one corruption, with one teacher and one seed; severity 0 is clean."""

    benchmark: str
    corruption: str
    severity: int
    teacher: str
    seed: int
    max_images: int | None
    skip_images: int
    methods: tuple[str, ...]

    @property
    def clean(self) -> bool:
        return self.corruption == CLEAN

    @property
    def folder(self) -> str:
        """Of its parts: short, and no other cell's."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:8]
        return f"{self.corruption}-{self.severity}-seed{self.seed}-{digest}"

    def labels(self) -> dict[str, Any]:
        """What its lines in result files begin with."""
        return {
            "benchmark": short_name(self.benchmark),
            "corruption": self.corruption,
            "severity": self.severity,
            "teacher": short_name(self.teacher),
            "seed": self.seed,
        }

    def indices(self, num_images: int) -> list[int]:
        """Which images of the benchmark, ascending; drawn, since many data sets are sorted by class.

        Raises:
            ValueError: where none is left.
        """
        order = np.random.default_rng(0).permutation(num_images)
        stop = None if self.max_images is None else self.skip_images + self.max_images
        chosen = sorted(order[self.skip_images : stop].tolist())
        if not chosen:
            raise ValueError(
                f"{self.benchmark}: expected more than {self.skip_images} images, which are skipped, got {num_images}"
            )
        return chosen

    def image_seed(self, index: int, purpose: str = "views") -> int:
        """Of one image, whatever stands beside it; 63 bits."""
        digest = hashlib.sha256(f"{self.seed}:{purpose}:{index}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


def short_name(name: str) -> str:
    """Of a folder or file the last part, so that results say nothing of the computer; a Hub name as it is."""
    return Path(name).resolve().name if os.path.exists(name) else name


def describe(sweeps: Sequence[Sweep], methods: dict[str, Method], *, batch_size: int) -> dict[str, Any]:
    """Everything that decides about the results, for the file by which a run is recognised."""
    return {
        "sweeps": [asdict(sweep) for sweep in sweeps],
        "methods": {
            name: {
                "title": method.title,
                "baseline": method.baseline,
                "num_views": method.num_views,
                "options": {key: short_name(str(value)) for key, value in options_of(method).items()},
            }
            for name, method in methods.items()
        },
        "batch_size": batch_size,
    }
