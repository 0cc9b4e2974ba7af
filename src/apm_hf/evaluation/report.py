"""Write `report.md`, its figures and model-index entries from a run's files; equal files give equal bytes."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..runs.files import write_atomically
from ..runs.unreadable_images import SKIPPED
from .plots import Curve, Panels, draw_cost, draw_reliability, draw_severity, draw_steps
from .results import CLEAN_CONDITION, Condition, Results, RowKey, read_results
from .statistics import Interval
from .tables import (
    FEW_IMAGES,
    NOTHING,
    clean_table,
    corruption_table,
    facts_list,
    methods_table,
    seconds_per_image,
    shift_table,
)

# ---- figures --------------------------------------------------------------------------------------------------------


def _figures(run: Results, benchmark: str, teacher: str) -> dict[str, tuple[str, bytes]]:
    """Return kind of figure -> its title and PNG."""
    methods = {run.method_title(method): run.baseline(method) is None for method in run.methods}
    chance = 1 / run.info["benchmarks"][benchmark]["num_classes"]
    where = f"{run.benchmark_title(benchmark)}, teacher {_teacher_title(run, teacher)}"
    conditions = run.conditions(benchmark, teacher)
    corrupted = [condition for condition in conditions if condition != CLEAN_CONDITION]
    populations = {"clean": [CLEAN_CONDITION]} if CLEAN_CONDITION in conditions else {}
    populations |= {"mean over corruptions": corrupted} if corrupted else {}
    pictures = {}

    def add(kind: str, text: str, draw: Callable[[Panels], bytes], curves: Any, references: Any = None) -> None:
        curves = {panel: by_method for panel, by_method in curves.items() if by_method}
        if curves:
            title = f"{text}: {where}"
            panels = Panels(title, methods, curves, chance, references or {})
            pictures[kind] = (title, draw(panels))

    if corrupted:
        curves = {
            panel: _by_severity(run, benchmark, teacher, names) for panel, names in _corruptions(conditions).items()
        }
        add("severity", "Accuracy against severity", draw_severity, curves)
    curves, references = {}, {}
    for panel, chosen in populations.items():
        curves[panel], references[panel] = _by_step(run, benchmark, teacher, chosen)
    add("steps", "Accuracy against gradient steps", draw_steps, curves, references)
    curves = {panel: _by_cost(run, benchmark, teacher, chosen) for panel, chosen in populations.items()}
    add("cost", "Accuracy against cost", draw_cost, curves)
    panel, chosen = next(iter(populations.items()))
    pooled = {run.method_title(method): run.pooled(benchmark, teacher, method, chosen) for method in run.methods}
    known = {title: (x.confidence, x.correct, x.images) for title, x in pooled.items() if x is not None}
    if known:
        title = f"Reliability, {panel}: {where}"
        pictures["reliability"] = (title, draw_reliability(title, methods, known))
    return pictures


def _corruptions(conditions: Sequence[Condition]) -> dict[str, list[str]]:
    """Return panel title -> corruptions, their mean first."""
    names = sorted({condition[0] for condition in conditions if condition != CLEAN_CONDITION})
    mean = {f"mean of {len(names)} corruptions": names} if len(names) > 1 else {}
    return mean | {name.replace("_", " "): [name] for name in names}


def _by_severity(run: Results, benchmark: str, teacher: str, names: Sequence[str]) -> dict[str, Curve]:
    severities = sorted({condition[1] for condition in run.conditions(benchmark, teacher)})
    curves = {}
    for method in run.methods:
        points = {}
        for severity in severities:
            conditions = [(name, severity) for name in names] if severity else [CLEAN_CONDITION]
            predictions = run.pooled(benchmark, teacher, method, conditions)
            if predictions is not None:
                points[severity] = predictions.accuracy()
        if set(points) - {0}:
            curves[run.method_title(method)] = Curve(list(points), list(points.values()))
    return curves


def _by_step(
    run: Results, benchmark: str, teacher: str, conditions: Sequence[Condition]
) -> tuple[dict[str, Curve], dict[str, Interval]]:
    curves, references = {}, {}
    for method in run.methods:
        predictions, baseline = run.pooled(benchmark, teacher, method, conditions), run.baseline(method)
        if predictions is None or not predictions.by_step:
            continue
        stop = None if predictions.steps is None else (float(predictions.steps.mean()), predictions.accuracy())
        points = {step: predictions.accuracy_at(step) for step in predictions.by_step}
        curves[run.method_title(method)] = Curve(list(points), list(points.values()), stop=stop)
        theirs = None if baseline is None else run.pooled(benchmark, teacher, baseline, conditions)
        if baseline is not None and theirs is not None:
            references[run.method_title(baseline)] = theirs.accuracy()
    return curves, references


def _by_cost(run: Results, benchmark: str, teacher: str, conditions: Sequence[Condition]) -> dict[str, Curve]:
    curves = {}
    for method in run.methods:
        predictions = run.pooled(benchmark, teacher, method, conditions)
        cost = run.cost(benchmark, teacher, method, conditions)
        if predictions is not None and cost is not None and (seconds := seconds_per_image(cost)) > 0:
            low, high = np.quantile(cost.seconds / cost.images, (0.05, 0.95))
            curves[run.method_title(method)] = Curve([seconds], [predictions.accuracy()], spread=(low, high))
    return curves


# ---- files ----------------------------------------------------------------------------------------------------------


def write_report(folder: str | os.PathLike[str]) -> list[Path]:
    """Write `report.md` and its figures into a run's folder.

    Returns:
        Paths of the written files, `report.md` first.

    Raises:
        ValueError, OSError: as [`read_results`] does.
        ImportError: without matplotlib.
    """
    folder = Path(folder)
    run = read_results(folder)
    text, pictures = _header(run) + _left_out(folder / SKIPPED), {}
    for teacher in run.teachers():
        text += f"\n## Teacher: {_teacher_title(run, teacher)}\n"
        benchmarks = run.benchmarks(teacher)
        with_clean = [benchmark for benchmark in benchmarks if CLEAN_CONDITION in run.conditions(benchmark, teacher)]
        if len(with_clean) > 1:
            text += f"\n### Top-1 accuracy on clean images, %\n\n{shift_table(run, teacher, with_clean)}"
        for benchmark in benchmarks:
            text += _benchmark_section(run, benchmark, teacher)
            several = len(run.teachers()) > 1
            for kind, (title, png) in _figures(run, benchmark, teacher).items():
                parts = [kind, benchmark, *([_teacher_title(run, teacher)] if several else [])]
                name = "_".join(re.sub(r"\W+", "-", part) for part in parts) + ".png"
                text += f"\n![{title}]({name})\n"
                pictures[name] = png
    for name, png in pictures.items():
        write_atomically(folder / name, png)
    write_atomically(folder / "report.md", text.encode())
    return [folder / "report.md", *(folder / name for name in pictures)]


def _left_out(path: Path) -> str:
    if not path.exists():
        return ""
    number = len(path.read_text().splitlines())
    return f"* skipped for every method: {number} unreadable images, listed in `{path.name}`\n"


def eval_results(
    folder: str | os.PathLike[str], method: str, *, teacher: str | None = None, dataset_split: str = "test"
) -> list[EvalResult]:
    """Return a method's top-1 accuracies for a model card, marked as not verified.

    Args:
        folder: folder of a run.
        method: its name in `run.json`.
        teacher: name of the teacher, if the run has several.
        dataset_split: the split that the benchmarks' images come from.

    Returns:
        One result for the clean images (configuration "default") and one per corruption (all severities pooled) of
        every benchmark; accuracy in [0, 1], its 95 % interval among the metric's arguments.

    Raises:
        ValueError: for a method or teacher without results, several teachers and none chosen; as [`read_results`].
    """
    run = read_results(folder)
    teachers = run.teachers()
    if teacher is None and len(teachers) > 1 or teacher is not None and teacher not in teachers:
        raise ValueError(f"teacher: expected one of {teachers}, got {teacher!r}")
    teacher = teacher or teachers[0]
    results = []
    for benchmark in run.benchmarks(teacher):
        conditions = run.conditions(benchmark, teacher)
        for corruption in dict.fromkeys(condition[0] for condition in conditions):
            chosen = [condition for condition in conditions if condition[0] == corruption]
            predictions = run.pooled(benchmark, teacher, method, chosen)
            if predictions is None:
                continue
            accuracy = predictions.accuracy()
            results.append(
                EvalResult(
                    task_type="zero-shot-image-classification",
                    dataset_type=benchmark,
                    dataset_name=run.benchmark_title(benchmark),
                    dataset_config="default" if corruption == CLEAN_CONDITION[0] else corruption,
                    dataset_split=dataset_split,
                    dataset_args={
                        "severities": [severity for _, severity in chosen],
                        "images": predictions.num_images,
                    },
                    metric_type="accuracy",
                    metric_name="top-1 accuracy",
                    metric_value=accuracy.mean,
                    metric_args={"teacher": teacher, "method": method, "interval_95": [accuracy.low, accuracy.high]},
                    verified=False,
                )
            )
    if not results:
        raise ValueError(f"method: expected one with results of the teacher {teacher!r}, got {method!r}")
    return results


def write_model_index(folder: str | os.PathLike[str], method: str, model_name: str, **options: Any) -> Path:
    """Write `model_index.json`, the `model-index` of a model card; options are those of [`eval_results`]."""
    index = eval_results_to_model_index(model_name, eval_results(folder, method, **options))
    path = Path(folder) / "model_index.json"
    write_atomically(path, (json.dumps({"model-index": index}, indent=2) + "\n").encode())
    return path


def _header(run: Results) -> str:
    lines = facts_list({name: run.info.get(name) for name in ("command", "commit", "computer", "versions")})
    missing = "".join(
        f"* Incomplete: {run.method_title(method)} lacks {count:,} predictions that another method has.\n"
        for method, count in _missing(run).items()
    )
    return (
        f"# Evaluation\n\n{lines}{missing}\n"
        "Intervals are 95 %: Wilson's for one prediction per image, else the bootstrap over images, an image always "
        "with all its corruptions and seeds. A difference is paired with the method's baseline, which "
        f"queries the teacher with the same views. Figures from fewer than {FEW_IMAGES} images show their interval. "
        "ECE grows as images get fewer: compare it between methods, not between benchmarks. Seconds include the "
        f"teacher. The oracle step is the best common one, chosen with the labels: no method can attain it. "
        f"{NOTHING}: not measured, or missing in part of a mean.\n\n{methods_table(run)}"
    )


def _missing(run: Results) -> dict[str, int]:
    """Return method -> number of predictions missing in cells where it has some and other methods have more."""
    union: defaultdict[RowKey, set[int]] = defaultdict(set)
    for cell, predictions in run.predictions.items():
        union[cell._replace(method="")].update(predictions.images.tolist())
    counts = dict.fromkeys(run.methods, 0)
    for cell, predictions in run.predictions.items():
        counts[cell.method] += len(union[cell._replace(method="")]) - len(predictions.images)
    return {method: count for method, count in counts.items() if count}


def _benchmark_section(run: Results, benchmark: str, teacher: str) -> str:
    conditions = run.conditions(benchmark, teacher)
    text = f"\n### {run.benchmark_title(benchmark)}\n"
    if CLEAN_CONDITION in conditions:
        text += f"\nClean images:\n\n{clean_table(run, benchmark, teacher)}"
    corrupted = [condition for condition in conditions if condition != CLEAN_CONDITION]
    if corrupted:
        names = {name: [condition for condition in corrupted if condition[0] == name] for name, _ in corrupted}
        columns = {name.replace("_", " "): chosen for name, chosen in names.items()}
        text += "\nTop-1 accuracy on corrupted images, %, over all severities:\n\n"
        text += corruption_table(run, benchmark, teacher, columns)
    severities = sorted({severity for _, severity in corrupted})
    if len(severities) > 1:
        levels = {
            f"severity {level}": [condition for condition in corrupted if condition[1] == level]
            for level in severities
        }
        text += "\nThe same by severity, over all corruptions:\n\n"
        text += corruption_table(run, benchmark, teacher, levels)
    return text


def _teacher_title(run: Results, teacher: str) -> str:
    """Return the last part of a path or Hub name, if that is unambiguous."""
    short = [Path(name).name for name in run.teachers()]
    return Path(teacher).name if short.count(Path(teacher).name) == 1 else teacher
