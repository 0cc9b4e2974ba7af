"""`apm evaluate`: a report, on labels or on masks."""

import argparse
import logging
from typing import Any

logger = logging.getLogger("apm_hf")

HELP = "an APM beside its teacher, its rivals and its controls: a report, on labels or on masks"
TASKS = ("zero-shot", "islands")
_OF_ALL = {"output_dir", "data", "teacher", "model", "methods", "max_images", "batch_size"}


def add_options(parser: argparse.ArgumentParser) -> None:
    # What is not given is left to the functions that do the work.
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("--task", default=TASKS[0], choices=TASKS, help="classify, or find parts and wholes")
    parser.add_argument("--output_dir", required=True, help="of results and report; an interrupted run goes on there")
    parser.add_argument("--data", nargs="+", help="benchmarks or data sets with masks, folders, or scenes")
    parser.add_argument("--teacher", nargs="+", help="names or folders; of islands, one")
    parser.add_argument("--model", help="a distilled APM, as wide as the teacher")
    parser.add_argument("--methods", nargs="+", help="those to run, of the suite's or the table's")
    parser.add_argument("--max_images", type=int, help="of every cell or data set")
    parser.add_argument("--batch_size", type=int, help="images at a time")
    labels = parser.add_argument_group("of --task zero-shot")
    labels.add_argument("--suite", help="smoke (the default), photos, ood, fine_grained or custom")
    labels.add_argument("--corruptions", nargs="+", help="instead of the suite's")
    labels.add_argument("--severities", nargs="+", type=int, help="1 to 5, instead of the suite's")
    labels.add_argument("--seeds", nargs="+", type=int, help="instead of 0")
    labels.add_argument("--num_views", type=int, help="of methods that look at several (default: 16)")
    labels.add_argument("--allow_chance", action="store_true", help="even where labels look like another data set's")
    masks = parser.add_argument_group("of --task islands")
    masks.add_argument("--masks", nargs="+", metavar="LEVEL=COLUMN", help="whole=COLUMN, part=COLUMN; else found")
    masks.add_argument("--split", help="of the data")
    masks.add_argument("--image_column", help="by default found")
    masks.add_argument("--ignore_labels", nargs="+", type=int, help="pixels that do not count (default: 255)")
    masks.add_argument("--map_size", type=int, help="side of everybody's maps (default: 96 for scenes, else 112)")
    masks.add_argument("--segments", type=int, help="for every image, instead of as many as its mask has")
    masks.add_argument("--level_layers", nargs="+", type=int, help="teacher layers that levels were distilled from")
    masks.add_argument("--ttt_steps", type=int, help="gradient steps of the rows that adapt")
    masks.add_argument("--ttt_factor", type=int, help="how many times finer than the teacher's their targets are")
    masks.add_argument("--seed", type=int, help="of everything that is drawn (default: 0)")
    parser.set_defaults(groups={"zero-shot": _names(labels), "islands": _names(masks)})


def run(options: argparse.Namespace) -> int:
    from ..processes import command_line

    given = vars(options)
    groups, task, command = given.pop("groups"), given.pop("task"), command_line("apm", given.pop("arguments"))
    wrong = [name for name in given.keys() & (groups["zero-shot"] | groups["islands"]) if name not in groups[task]]
    if wrong:
        raise ValueError(f"--task {task}: expected no --{sorted(wrong)[0]}, which is of another task")
    given = {name: value for name, value in given.items() if name in _OF_ALL | groups[task]}
    folder = (_islands if task == "islands" else _zero_shot)(given, command)
    logger.info(f"report: {folder / 'report.md'}")
    return 0


def _zero_shot(given: dict[str, Any], command: str) -> Any:
    from ..evaluation.suites import evaluate

    teachers = given.pop("teacher", [])
    return evaluate(**{"suite": "smoke", **given}, teachers=teachers, command=command)


def _islands(given: dict[str, Any], command: str) -> Any:
    from dataclasses import replace

    from ..evaluation.dense import GRID_TTT, evaluate_islands

    teachers, steps = given.pop("teacher", [None]), given.pop("ttt_steps", GRID_TTT.steps)
    if len(teachers) > 1:
        raise ValueError(f"--teacher: expected one, got {teachers}")
    return evaluate_islands(**given, teacher=teachers[0], ttt=replace(GRID_TTT, steps=steps), command=command)


def _names(group: Any) -> set[str]:
    return {action.dest for action in group._group_actions}
