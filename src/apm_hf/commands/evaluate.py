"""`apm evaluate`: a report, on labels, masks or features."""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from .options import add

logger = logging.getLogger("apm_hf")

HELP = "compare an APM with its teacher, other methods and controls; write a report"
DESCRIPTION = """
Measure an APM beside its teacher, with the same prompts and views, beside other label-free methods and beside
controls, and write a report: on labels, clean and corrupted (--task zero-shot), on masks of parts and wholes
(--task islands), or on how close a dense student comes to its teacher at twice the side (--task dense). By default
everything is embedded, and needs no network. A run that was interrupted goes on; --task dense begins again.
"""
EXAMPLES = (
    "apm evaluate --output_dir runs/smoke",
    "apm evaluate --suite photos --data photos/ --teacher openai/clip-vit-base-patch16 --output_dir runs/photos",
    "apm evaluate --task islands --data scenes --max_images 20 --output_dir runs/islands",
    "apm evaluate --task dense --data photos/ --teacher user/vit --model runs/dense --output_dir runs/compared",
)
RESULT = {
    "task": "zero-shot, islands or dense",
    "output_dir": "folder of results and report; the same command goes on there",
    "report": "the report's file",
    "scores": "of zero-shot, a list of cells: benchmark, corruption, severity, teacher, seed, method, top1 with its "
    "95 % interval low and high, images; of islands, data set -> its summary, and of dense, method -> its row, as in "
    "results.json",
}
INTERRUPTED = "the same command goes on where it was"
SMALLER = "a smaller --batch_size"
TASKS = ("zero-shot", "islands", "dense")
_OF_ALL = {"output_dir", "data", "teacher", "model", "methods", "max_images", "max_unreadable_images", "batch_size"}


def add_options(parser: argparse.ArgumentParser) -> None:
    # What is not given is left to the functions that do the work.
    parser.argument_default = argparse.SUPPRESS
    add(parser, "--config")
    parser.add_argument(
        "--task",
        default=TASKS[0],
        choices=TASKS,
        help="classify, find parts and wholes, or compare features between tokens",
    )
    add(parser, "--output_dir", "results and report; an interrupted run goes on there", required=True)
    parser.add_argument(
        "--data", nargs="+", metavar="NAME", help="benchmarks or data sets with masks, folders, or scenes"
    )
    add(parser, "--teacher", "of zero-shot, one or more", nargs="+")
    add(parser, "--model", "distilled, as wide as the teacher")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="those to run, of the suite's or the table's")
    add(parser, "--max_images", "of every cell or data set")
    add(parser, "--max_unreadable_images", "0 by default")
    add(parser, "--batch_size")
    labels = parser.add_argument_group("of --task zero-shot")
    labels.add_argument(
        "--suite",
        choices=("smoke", "photos", "ood", "fine_grained", "custom"),
        help="what is run; smoke is the default",
    )
    labels.add_argument("--corruptions", nargs="+", metavar="NAME", help="instead of the suite's")
    labels.add_argument("--severities", nargs="+", type=int, help="1 to 5, instead of the suite's")
    labels.add_argument("--seeds", nargs="+", type=int, help="instead of 0")
    labels.add_argument(
        "--num_views", type=int, help="views of each image, for methods that average several (default: 16)"
    )
    labels.add_argument("--allow_chance", action="store_true", help="even where labels look like another data set's")
    masks = parser.add_argument_group("of --task islands")
    masks.add_argument("--masks", nargs="+", metavar="LEVEL=COLUMN", help="whole=COLUMN, part=COLUMN; else found")
    add(masks, "--split")
    add(masks, "--image_column")
    masks.add_argument("--ignore_labels", nargs="+", type=int, help="pixels that do not count (default: 255)")
    masks.add_argument("--map_size", type=int, help="side of all maps (default: 96 for scenes, else 112)")
    masks.add_argument("--segments", type=int, help="for every image, instead of as many as its mask has")
    masks.add_argument("--level_layers", nargs="+", type=int, help="teacher layers that levels were distilled from")
    masks.add_argument("--ttt_steps", type=int, help="gradient steps of the rows that adapt")
    masks.add_argument("--ttt_factor", type=int, help="how many times finer than the teacher's their targets are")
    add(masks, "--seed", "0 by default")
    dense = {"split", "image_column", "seed"}
    parser.set_defaults(groups={"zero-shot": _names(labels), "islands": _names(masks), "dense": dense})


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    from ..runs.processes import command_line, process_state

    given = dict(vars(options))
    groups, task, command = given.pop("groups"), given.pop("task"), command_line("apm", given.pop("arguments"))
    wrong = [name for name in given.keys() & set().union(*groups.values()) if name not in groups[task]]
    if wrong:
        raise ValueError(f"--task {task}: expected no --{sorted(wrong)[0]}, which is of another task")
    given = {name: value for name, value in given.items() if name in _OF_ALL | groups[task]}
    folder = {"islands": _islands, "dense": _dense, "zero-shot": _zero_shot}[task](given, command)
    if not process_state().is_main_process:
        return None
    logger.info(f"report: {folder / 'report.md'}")
    scores = None
    if options.json:
        scores = _zero_shot_scores(folder) if task == "zero-shot" else _written_scores(folder, task)
    return {"task": task, "output_dir": folder, "report": folder / "report.md", "scores": scores}


def _zero_shot(given: dict[str, Any], command: str) -> Path:
    from ..evaluation.labels.suites import evaluate

    teachers = given.pop("teacher", [])
    return evaluate(**{"suite": "smoke", **given}, teachers=teachers, command=command)


def _islands(given: dict[str, Any], command: str) -> Path:
    from dataclasses import replace

    from ..evaluation.masks import GRID_TTT, evaluate_islands

    teachers, steps = given.pop("teacher", [None]), given.pop("ttt_steps", GRID_TTT.steps)
    if len(teachers) > 1:
        raise ValueError(f"--teacher: expected one, got {teachers}")
    return evaluate_islands(**given, teacher=teachers[0], ttt=replace(GRID_TTT, steps=steps), command=command)


def _dense(given: dict[str, Any], command: str) -> Path:
    from ..evaluation.dense import evaluate_features

    single = {}
    for name in ("data", "teacher"):
        values = given.pop(name, [])
        if len(values) != 1:
            raise ValueError(f"--{name}: expected one with --task dense, got {values or 'none'}")
        single[name] = values[0]
    if "model" not in given:
        raise ValueError("--model: expected a dense student with --task dense, got none")
    if names := sorted(given.keys() & {"max_unreadable_images", "batch_size"}):
        raise ValueError(f"--task dense: expected no --{names[0]}, which is of another task")
    return evaluate_features(**given, **single, command=command)


def _zero_shot_scores(folder: Path) -> list[dict[str, Any]]:
    from ..evaluation.results import read_results

    rows = []
    for cell, answers in sorted(read_results(folder).predictions.items()):
        accuracy = answers.accuracy()
        rows.append(
            cell._asdict()
            | {"top1": float(accuracy.mean), "low": float(accuracy.low), "high": float(accuracy.high)}
            | {"images": answers.num_images}
        )
    return rows


def _written_scores(folder: Path, task: str) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["rows" if task == "dense" else "data"]


def _names(group: Any) -> set[str]:
    return {action.dest for action in group._group_actions}
