"""Read the result files of a run into columns.

A run is a folder with `results.jsonl` (a line per image, condition and method), `costs.jsonl` (a line per batch) and
`run.json` (what was run); [`read_results`] says what they hold. A condition is a corruption and its severity,
("none", 0) for clean images.

Legend: N rows, one per image, condition and seed.
"""

import json
import math
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..runs.run import check_manifest
from .statistics import Interval, mean_interval, paired_interval

Condition = tuple[str, int]
CLEAN_CONDITION: Condition = ("none", 0)
_ROUNDING = 1e-5  # softmax in float32 may exceed 1


class RowKey(NamedTuple):
    """Name what rows have in common: benchmark, corruption, severity, teacher, seed and method."""

    benchmark: str
    corruption: str
    severity: int
    teacher: str
    seed: int
    method: str

    @property
    def condition(self) -> Condition:
        """The condition: corruption and severity."""
        return self.corruption, self.severity


@dataclass(frozen=True)
class Predictions:
    """Hold the predictions of a method.

    Args:
        images: `(N,)`, indices in their data set.
        correct, correct_top5: `(N,)`, 0 or 1: whether the first, or one of the first five classes, is correct.
        confidence: `(N,)`, probability of the first class, in [0, 1].
        by_step: step -> `(N,)`, 0 or 1: whether the class after that step is correct; only steps that all rows have.
        steps: `(N,)`, gradient steps taken; None without any.
    """

    images: np.ndarray
    correct: np.ndarray
    correct_top5: np.ndarray
    confidence: np.ndarray
    by_step: Mapping[int, np.ndarray]
    steps: np.ndarray | None

    @classmethod
    def join(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Concatenate predictions, e.g. of several seeds."""
        common = set.intersection(*(set(part.by_step) for part in parts))
        steps = [part.steps for part in parts if part.steps is not None]
        return cls(
            images=np.concatenate([part.images for part in parts]),
            correct=np.concatenate([part.correct for part in parts]),
            correct_top5=np.concatenate([part.correct_top5 for part in parts]),
            confidence=np.concatenate([part.confidence for part in parts]),
            by_step={step: np.concatenate([part.by_step[step] for part in parts]) for step in sorted(common)},
            steps=np.concatenate(steps) if len(steps) == len(parts) else None,
        )

    @property
    def num_images(self) -> int:
        """The number of different images."""
        return len(np.unique(self.images))

    def accuracy(self) -> Interval:
        """Return the share of images whose first class is correct."""
        return mean_interval(self.correct, groups=self.images)

    def accuracy_at(self, step: int) -> Interval:
        """Return the share of images whose class after `step` gradient steps is correct."""
        return mean_interval(self.by_step[step], groups=self.images)

    def best_step(self) -> int | None:
        """Return the step with the most correct predictions, the earliest of ties; needs labels."""
        return max(self.by_step, key=lambda step: (self.by_step[step].sum(), -step), default=None)


@dataclass(frozen=True)
class Cost:
    """Hold, per batch, the number of images, seconds, and peak bytes above the batch's start."""

    images: np.ndarray
    seconds: np.ndarray
    peak_bytes: np.ndarray


@dataclass(frozen=True)
class Results:
    """Hold the contents of a run's files.

    Args:
        info: content of `run.json`.
        predictions, costs: by cell.
    """

    info: Mapping[str, Any]
    predictions: Mapping[RowKey, Predictions]
    costs: Mapping[RowKey, Cost]

    @property
    def methods(self) -> list[str]:
        """The names of the methods, in the run's order."""
        return list(self.info["methods"])

    def method_title(self, method: str) -> str:
        """Return the method's title in tables and figures; its name if it was not run itself."""
        if method not in self.info["methods"]:
            return method
        titles = Counter(entry["title"] for entry in self.info["methods"].values())
        title = self.info["methods"][method]["title"]
        return title if titles[title] == 1 else f"{title} ({method})"

    def benchmark_title(self, benchmark: str) -> str:
        """Return the title of a benchmark in tables and figures."""
        return self.info["benchmarks"][benchmark]["title"]

    def baseline(self, method: str) -> str | None:
        """Return the name of the method that this one is compared with, if any."""
        return self.info["methods"][method]["baseline"]

    def teachers(self) -> list[str]:
        """Return the teachers' names, sorted."""
        return sorted({cell.teacher for cell in self.predictions})

    def benchmarks(self, teacher: str) -> list[str]:
        """Return the benchmarks that a teacher was evaluated on, in the run's order."""
        seen = {cell.benchmark for cell in self.predictions if cell.teacher == teacher}
        return [benchmark for benchmark in self.info["benchmarks"] if benchmark in seen]

    def conditions(self, benchmark: str, teacher: str) -> list[Condition]:
        """Return the conditions: clean first, then corruptions by name and severity."""
        cells = [cell for cell in self.predictions if (cell.benchmark, cell.teacher) == (benchmark, teacher)]
        return sorted(
            {cell.condition for cell in cells}, key=lambda condition: (condition != CLEAN_CONDITION, condition)
        )

    def cells(self, benchmark: str, teacher: str, method: str, conditions: Iterable[Condition]) -> list[RowKey]:
        """Return the method's rows of these conditions, all seeds; none if it lacks one, so that means compare."""
        wanted, key = set(conditions), (benchmark, teacher, method)
        cells = [x for x in self.predictions if (x.benchmark, x.teacher, x.method) == key and x.condition in wanted]
        return sorted(cells) if {cell.condition for cell in cells} == wanted else []

    def pooled(self, benchmark: str, teacher: str, method: str, conditions: Iterable[Condition]) -> Predictions | None:
        """Return a method's predictions of these conditions, all seeds together; None if it lacks one."""
        cells = self.cells(benchmark, teacher, method, conditions)
        return Predictions.join([self.predictions[cell] for cell in cells]) if cells else None

    def paired(
        self, benchmark: str, teacher: str, method: str, conditions: Iterable[Condition]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Return `(N,)` each: method correct, baseline correct, and image, for rows that both have.

        None without a baseline or if a condition has no such rows.
        """
        baseline, wanted = self.baseline(method), set(conditions)
        pairs, seen = [], set()
        for cell in self.cells(benchmark, teacher, method, wanted):
            ours, theirs = self.predictions[cell], self.predictions.get(cell._replace(method=baseline or ""))
            if theirs is not None:
                images, at, there = np.intersect1d(ours.images, theirs.images, assume_unique=True, return_indices=True)
                pairs.append((ours.correct[at], theirs.correct[there], images))
                seen |= {cell.condition} if len(images) else set()
        if not pairs or seen != wanted:
            return None
        correct, baseline_correct, of_images = zip(*pairs, strict=True)
        return np.concatenate(correct), np.concatenate(baseline_correct), np.concatenate(of_images)

    def difference(
        self, benchmark: str, teacher: str, method: str, conditions: Iterable[Condition]
    ) -> Interval | None:
        """Return the accuracy minus the baseline's, over the rows that both have."""
        pairs = self.paired(benchmark, teacher, method, conditions)
        return None if pairs is None else paired_interval(pairs[0], pairs[1], groups=pairs[2])

    def cost(self, benchmark: str, teacher: str, method: str, conditions: Iterable[Condition]) -> Cost | None:
        """Return a method's cost over these conditions; None if any is unknown."""
        parts = [self.costs.get(cell) for cell in self.cells(benchmark, teacher, method, conditions)]
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts):
            return None
        return Cost(
            *(np.concatenate([getattr(x, name) for x in known]) for name in ("images", "seconds", "peak_bytes"))
        )


def read_results(folder: str | os.PathLike[str]) -> Results:
    """Read a run's three files.

    Args:
        folder: with

            * `results.jsonl`: benchmark, corruption ("none": clean), severity (0: clean), teacher, seed, method;
              image, label, top5 (classes, best first), confidence; optionally steps, and by_step (step -> class);
            * `costs.jsonl`: the same six names of a cell; images, seconds (of all of them) and peak_bytes of a batch;
            * `run.json`: methods (title, baseline, num_views, options), benchmarks (title, num_classes), and command,
              commit, computer, versions.

    Raises:
        ValueError: for rows that are truncated, lack a column, occur twice or have a name missing in `run.json`, or
            no rows. The message names the file and the line.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    check_manifest(folder)
    info = _read_info(folder / "run.json")
    cells: dict[tuple[Any, ...], _Rows] = {}
    path = folder / "results.jsonl"
    _read_lines(path, lambda row, line: _rows_of(row, cells, info, _Rows).add(row, line))
    batches: dict[tuple[Any, ...], _Batches] = {}
    _read_lines(folder / "costs.jsonl", lambda row, line: _rows_of(row, batches, info, _Batches).add(row))
    predictions = {RowKey(*key): rows.predictions(path) for key, rows in cells.items()}
    return Results(info, predictions, {RowKey(*key): rows.cost() for key, rows in batches.items()})


class _Rows:
    """Collect a cell's rows in columns: dictionaries would take 20 times the memory."""

    def __init__(self) -> None:
        self.lines, self.images, self.steps = array("q"), array("q"), array("q")
        self.correct, self.correct_top5, self.confidence = array("b"), array("b"), array("d")
        self.by_step: defaultdict[str, array[int]] = defaultdict(lambda: array("b"))

    def add(self, row: Mapping[str, Any], line: int) -> None:
        label, top5, confidence, by_step = row["label"], row["top5"], row["confidence"], row.get("by_step") or {}
        if type(label) is not int or type(top5) is not list or set(map(type, top5)) != {int}:
            raise ValueError(f"expected an integer label and a list of integers top5, got {label!r} and {top5!r}")
        if not -_ROUNDING <= confidence <= 1 + _ROUNDING:
            raise ValueError(f"expected a confidence in [0, 1], got {confidence}")
        if not set(map(type, by_step.values())) <= {int}:
            raise ValueError(f"expected integer classes in by_step, got {by_step}")
        self.images.append(row["image"])
        self.lines.append(line)
        self.correct.append(top5[0] == label)
        self.correct_top5.append(label in top5[:5])
        self.confidence.append(min(max(confidence, 0.0), 1.0))
        if row.get("steps") is not None:
            self.steps.append(row["steps"])
        for step, predicted in by_step.items():
            self.by_step[step].append(predicted == label)

    def predictions(self, path: Path) -> Predictions:
        images = np.array(self.images)
        order = np.argsort(images, kind="stable")
        if len(twice := np.flatnonzero(np.diff(images[order]) == 0)):
            first, second = (self.lines[order[twice[0] + offset]] for offset in (0, 1))
            raise ValueError(f"{path}, line {second}: expected an image once per cell, got the one of line {first}")
        # A step is common if every row has it: then its column is as long as the rows and in their order.
        common = sorted((int(step), step) for step, column in self.by_step.items() if len(column) == len(images))
        by_step = {number: np.array(self.by_step[step])[order] for number, step in common}
        steps = np.array(self.steps)[order] if len(self.steps) == len(images) else None
        correct, correct_top5 = np.array(self.correct)[order], np.array(self.correct_top5)[order]
        return Predictions(images[order], correct, correct_top5, np.array(self.confidence)[order], by_step, steps)


class _Batches:
    """Collect a cell's costs."""

    def __init__(self) -> None:
        self.images, self.seconds, self.peak_bytes = array("q"), array("d"), array("q")

    def add(self, row: Mapping[str, Any]) -> None:
        if not (row["images"] >= 1 and 0 <= row["seconds"] < math.inf):
            raise ValueError(f"expected at least one image and finite seconds, got {row['images']}, {row['seconds']}")
        self.images.append(row["images"])
        self.seconds.append(row["seconds"])
        self.peak_bytes.append(row["peak_bytes"])

    def cost(self) -> Cost:
        return Cost(np.array(self.images), np.array(self.seconds), np.array(self.peak_bytes))


def _rows_of(row: Mapping[str, Any], cells: dict[tuple[Any, ...], Any], info: Any, collect: Callable[[], Any]) -> Any:
    """Return the collected rows of this row's cell; check the cell if it is new."""
    key = (row["benchmark"], row["corruption"], row["severity"], row["teacher"], row["seed"], row["method"])
    if key not in cells:
        for name, value in zip(RowKey._fields, key, strict=True):
            expected = int if name in ("severity", "seed") else str
            if type(value) is not expected:
                raise ValueError(f"expected {name} to be {expected.__name__}, got {value!r}")
        for kind, value in (("methods", key[-1]), ("benchmarks", key[0])):
            if value not in info[kind]:
                raise ValueError(f"expected one of the {kind} in run.json, {list(info[kind])}, got {value!r}")
        if (key[1] == CLEAN_CONDITION[0]) != (key[2] == CLEAN_CONDITION[1]):
            raise ValueError(f'expected the corruption "none" with severity 0 and no other, got {key[1:3]}')
        cells[key] = collect()
    return cells[key]


def _read_lines(path: Path, add: Callable[[Any, int], None]) -> None:
    number = 0
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if type(row) is not dict:
                    raise ValueError(f"expected a JSON object, got {type(row).__name__}")
                add(row, number)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}") from error
            except KeyError as error:
                raise ValueError(f"{path}, line {number}: expected the column {error}, got {sorted(row)}") from error
            except (AttributeError, OverflowError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not number:
        raise ValueError(f"{path}: expected at least one row, got none")


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        info = {**info, **info.get("identity", {})}
        for method, entry in info["methods"].items():
            if not isinstance(entry["title"], str) or not isinstance(entry["baseline"], str | None):
                raise ValueError(f"expected a title and a baseline or null of the method {method!r}, got {entry}")
        for benchmark, entry in info["benchmarks"].items():
            if not isinstance(entry["title"], str) or not entry["num_classes"] >= 1:
                raise ValueError(f"expected a title and at least one class of the benchmark {benchmark!r}")
    except KeyError as error:
        raise ValueError(f"{path}: expected the entry {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return info
