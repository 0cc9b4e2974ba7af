"""Format a run's tables as markdown.

Methods are compared row by row with their baseline, which queries the teacher with the same views.

Legend: N rows, one per image, condition and seed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .metrics import expected_calibration_error
from .results import CLEAN_CONDITION, Condition, Cost, Predictions, Results
from .statistics import Interval, calibration_interval, mean_interval, paired_interval

FEW_IMAGES = 500  # numbers from fewer images show their interval
NOTHING = "–"


def clean_table(run: Results, benchmark: str, teacher: str) -> str:
    """Return markdown: every method's accuracy on the clean images and its cost."""
    header = ["method", "top-1, %", "95 % interval", "top-5, %", "ECE, %", "difference to its baseline, points"]
    header += ["s/image", "peak, MiB", "images", _ORACLE]
    rows = []
    for method in run.methods:
        predictions = run.pooled(benchmark, teacher, method, [CLEAN_CONDITION])
        if predictions is None:
            continue
        accuracy, num_images = predictions.accuracy(), predictions.num_images
        num_seeds = len(run.cells(benchmark, teacher, method, [CLEAN_CONDITION]))
        top5 = NOTHING  # with five classes, top-5 is always 100 %
        if run.info["benchmarks"][benchmark]["num_classes"] > 5:
            top5 = percent(mean_interval(predictions.correct_top5, groups=predictions.images), num_images)
        cost = run.cost(benchmark, teacher, method, [CLEAN_CONDITION])
        rows.append(
            [
                run.method_title(method),
                f"{100 * accuracy.mean:.1f}",
                f"[{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]",
                top5,
                _calibration(predictions),
                difference_cell(run.difference(benchmark, teacher, method, [CLEAN_CONDITION])),
                NOTHING if cost is None else f"{seconds_per_image(cost):.3g}",
                NOTHING if cost is None else f"{cost.peak_bytes.max() / 2**20:.0f}",
                f"{num_images:,}" + (f" x {num_seeds} seeds" if num_seeds > 1 else ""),
                _oracle(predictions),
            ]
        )
    return markdown_table(header, rows)


def shift_table(run: Results, teacher: str, benchmarks: Sequence[str]) -> str:
    """Return markdown: top-1 on the clean images of several benchmarks, and the mean over benchmarks."""
    header = ["method", *map(run.benchmark_title, benchmarks), "mean", "difference to its baseline, points"]
    rows = []
    for method in run.methods:
        predictions = [run.pooled(benchmark, teacher, method, [CLEAN_CONDITION]) for benchmark in benchmarks]
        known = [part for part in predictions if part is not None]
        if not known:
            continue
        mean = difference = NOTHING
        if len(known) == len(predictions):
            interval = mean_interval(
                np.concatenate([part.correct for part in known]),
                groups=np.concatenate([part.images for part in known]),
                strata=_numbered(known, lambda part: len(part.images)),
            )
            mean = percent(interval, min(part.num_images for part in known))
        paired = [run.paired(benchmark, teacher, method, [CLEAN_CONDITION]) for benchmark in benchmarks]
        pairs = [part for part in paired if part is not None]
        if len(pairs) == len(paired):
            ours, theirs, images = (np.concatenate(column) for column in zip(*pairs, strict=True))
            strata = _numbered(pairs, lambda part: len(part[0]))
            difference = difference_cell(paired_interval(ours, theirs, groups=images, strata=strata))
        rows.append([run.method_title(method), *map(_top1, predictions), mean, difference])
    return markdown_table(header, rows)


def corruption_table(run: Results, benchmark: str, teacher: str, columns: Mapping[str, Sequence[Condition]]) -> str:
    """Return markdown: top-1 over groups of conditions, and over all of them if a method has them all.

    Args:
        columns: title -> conditions whose predictions are pooled.
    """
    all_conditions = [condition for conditions in columns.values() for condition in conditions]
    rows = []
    for method in run.methods:
        predictions = [run.pooled(benchmark, teacher, method, conditions) for conditions in columns.values()]
        if all(part is None for part in predictions):
            continue
        pooled = run.pooled(benchmark, teacher, method, all_conditions)
        difference = difference_cell(run.difference(benchmark, teacher, method, all_conditions))
        oracle = NOTHING if pooled is None else _oracle(pooled)
        rows.append([run.method_title(method), *map(_top1, predictions), _top1(pooled), difference, oracle])
    return markdown_table(["method", *columns, "mean", "difference to its baseline, points", _ORACLE], rows)


_ORACLE = "oracle step (unattainable)"


def methods_table(run: Results) -> str:
    """Format the table of methods: title, name, views, baseline, options."""
    rows = []
    for method, entry in run.info["methods"].items():
        baseline = NOTHING if entry["baseline"] is None else run.method_title(entry["baseline"])
        options = ", ".join(f"{key}={value}" for key, value in sorted((entry.get("options") or {}).items()))
        rows.append([run.method_title(method), f"`{method}`", str(entry.get("num_views", NOTHING)), baseline, options])
    return markdown_table(["method", "name", "views", "baseline", "options"], rows)


def _top1(predictions: Predictions | None) -> str:
    return NOTHING if predictions is None else percent(predictions.accuracy(), predictions.num_images)


def percent(interval: Interval, num_images: int) -> str:
    """Format a share in percent, with its interval if there are few images."""
    text = f"{100 * interval.mean:.1f}"
    return text if num_images >= FEW_IMAGES else f"{text} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _calibration(predictions: Predictions) -> str:
    if predictions.num_images >= FEW_IMAGES:
        return f"{100 * expected_calibration_error(predictions.confidence, predictions.correct):.1f}"
    return percent(
        calibration_interval(predictions.confidence, predictions.correct, groups=predictions.images),
        predictions.num_images,
    )


def difference_cell(interval: Interval | None) -> str:
    """Format a difference in percentage points with its interval."""
    if interval is None:
        return NOTHING
    # Adding 0.0 makes -0.0 positive.
    mean, low, high = (round(100 * value, 1) + 0.0 for value in (interval.mean, interval.low, interval.high))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _oracle(predictions: Predictions) -> str:
    step = predictions.best_step()
    return NOTHING if step is None else f"{percent(predictions.accuracy_at(step), predictions.num_images)} at {step}"


def seconds_per_image(cost: Cost) -> float:
    """Return the mean time per image."""
    return math.fsum(cost.seconds) / int(cost.images.sum())  # fsum: independent of the order of the lines


def _numbered(parts: Sequence[Any], length: Callable[[Any], int]) -> np.ndarray:
    return np.repeat(np.arange(len(parts)), [length(part) for part in parts])


def interval_cell(found: Mapping[str, float] | None, *, signed: bool = False) -> str:
    """Format `mean`, `low` and `high` with three decimals."""
    if found is None:
        return NOTHING
    # Adding 0.0 makes -0.0 positive.
    mean, low, high = (round(found[name], 3) + 0.0 for name in ("mean", "low", "high"))
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if signed else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def facts_list(facts: Mapping[str, Any]) -> str:
    """List facts about a run, without those that are None or empty."""
    texts = {
        name: ", ".join(f"{key} {number}" for key, number in sorted(value.items()))
        if isinstance(value, Mapping)
        else value
        for name, value in facts.items()
    }
    return "".join(f"* {name}: `{value}`\n" for name, value in texts.items() if value not in (None, ""))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table without the columns that are empty."""
    columns = [0, *(at for at in range(1, len(header)) if any(row[at] != NOTHING for row in rows))]
    lines = [[header[at] for at in columns], ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[row[at].replace("|", "\\|") for at in columns] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
