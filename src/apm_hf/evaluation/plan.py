"""Plan an evaluation: sweeps over benchmarks, corruptions, teachers and seeds, divided into cells.

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
from .methods.task import Method, method_options

CLEAN = "none"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Describe every combination of benchmarks, methods, teachers, corruptions, severities and seeds.

    Args:
        benchmarks: names in `apm_hf.evaluation.labels.benchmarks.BENCHMARKS`, `"scenes"`, or folders, files and Hub
            names.
        methods: names in `apm_hf.evaluation.methods.registry.METHODS`.
        teachers: names or folders.
        corruptions: `"none"` for unchanged images, else names in `apm_hf.data.corruptions`.
        severities: 1 to 5, for every corruption but `"none"`.
        seeds: random seeds of views, of corruption noise and of models' initial weights.
        max_images, skip_images: per benchmark, in a fixed random order, so that one sweep may tune on images that
            another does not report.

    Raises:
        ValueError: for an empty field or a value outside its range.
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
        """Return the cells in order, the clean ones first."""
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
    """Name one benchmark under one corruption, with one teacher and one seed; severity 0 is clean."""

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
        """Return whether the images are not corrupted."""
        return self.corruption == CLEAN

    @property
    def folder(self) -> str:
        """Return the name of the cell's folder of parts: short and unique."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:8]
        return f"{self.corruption}-{self.severity}-seed{self.seed}-{digest}"

    def labels(self) -> dict[str, Any]:
        """Return the columns that the cell's lines in result files begin with."""
        return {
            "benchmark": short_name(self.benchmark),
            "corruption": self.corruption,
            "severity": self.severity,
            "teacher": short_name(self.teacher),
            "seed": self.seed,
        }

    def indices(self, num_images: int) -> list[int]:
        """Return the cell's image indices, ascending; drawn at random, since many data sets are sorted by class.

        Raises:
            ValueError: if no image is left.
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
        """Return the 63-bit seed of one image, independent of its batch."""
        digest = hashlib.sha256(f"{self.seed}:{purpose}:{index}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


def short_name(name: str) -> str:
    """Return the last part of a path, so that results reveal no local folders; a Hub name is unchanged."""
    return Path(name).resolve().name if os.path.exists(name) else name


def describe(sweeps: Sequence[Sweep], methods: dict[str, Method], *, batch_size: int) -> dict[str, Any]:
    """Return all settings that determine the results, for the file that identifies a run."""
    return {
        "sweeps": [asdict(sweep) for sweep in sweeps],
        "methods": {
            name: {
                "title": method.title,
                "baseline": method.baseline,
                "num_views": method.num_views,
                "options": {key: short_name(str(value)) for key, value in method_options(method).items()},
            }
            for name, method in methods.items()
        },
        "batch_size": batch_size,
    }
