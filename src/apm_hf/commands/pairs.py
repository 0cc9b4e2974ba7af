"""Load the student and the teacher that a command names with `--model` and `--teacher`."""

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..assets import DEMO_TEACHER
from .options import add

if TYPE_CHECKING:
    from pathlib import Path

    from ..pair import APM

logger = logging.getLogger("apm_hf")

# The RESULT of `apm islands` and `apm interpolate`.
RESULT = {
    "files": "pictures, and films where there are any",
    "model": "as given; null is the embedded one, or a fresh one",
    "teacher": "as given; null is the embedded one, or none",
    "num_parameters": "of the student",
    "fitted": "whether the student was fitted to what is drawn",
    "errors": "a list: photo and message, of those that could not be read",
}


def result(options: argparse.Namespace, files: "Sequence[Path]", pair: "APM", *, fitted: bool) -> dict[str, Any]:
    """Return what `RESULT` describes, and log the files."""
    logger.info("pictures: " + ", ".join(map(str, files)))
    return {
        "files": list(files),
        "model": options.model,
        "teacher": options.teacher,
        "num_parameters": pair.bare_model.num_parameters(),
        "fitted": fitted,
        "errors": [],
    }


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that [`load_pair`] reads."""
    add(parser, "--model", "distilled; by default, without --teacher, the embedded one")
    add(parser, "--teacher", "alone, a fresh student is fitted to its features")
    parser.add_argument(
        "--fresh", action="store_true", help="fit a fresh student, to the embedded teacher if none is named"
    )


def load_pair(options: argparse.Namespace, *, local_patch: bool = True, dense: bool = False) -> "APM":
    """Load what the options name, or a fresh student with random weights beside the teacher.

    Args:
        local_patch: whether a fresh student sees the pixels around each location.
        dense: instead of a fresh student, prefer a dense one of this teacher that travels with the package.

    Raises:
        ValueError: as [`APM.load`] does, and for `--fresh` beside `--model`.
    """
    from ..pair import APM

    if options.fresh and options.model is not None:
        raise ValueError("--fresh: expected no --model beside it")
    if options.model is None and options.teacher is None:
        note_embedded()
    if options.model is not None or (options.teacher is None and not options.fresh):
        return APM.load(options.model, teacher=options.teacher)
    teacher = APM.load(teacher=options.teacher or DEMO_TEACHER)
    if dense and not options.fresh and (pair := teacher.with_dense_student()) is not None:
        logger.info("no --model: the dense student of this teacher in the package; --fresh fits one to the photo")
        return pair
    return teacher.fresh(local_patch=local_patch, seed=options.seed)


def note_embedded() -> None:
    """Log that the embedded student and teacher are used."""
    logger.info("no --teacher and no --model: the embedded ones, which know drawn scenes only")


def caption(pair: "APM", what: str) -> str:
    """Say below a picture how large the student is, what was done with it, and which teacher it has."""
    size = f"{pair.bare_model.num_parameters() / 1e6:.1f} M parameters"
    teacher = pair.teacher
    if teacher is None:
        return f"APM, {size}, {what}"
    name = "the embedded one" if teacher.name == DEMO_TEACHER else teacher.name.rstrip("/").rpartition("/")[2]
    return f"APM, {size}, {what}; teacher: {name}"
