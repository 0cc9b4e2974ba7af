"""Load the student and the teacher that a command names with `--model` and `--teacher`."""

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .options import add

if TYPE_CHECKING:
    from pathlib import Path

    from ..pair import APM

logger = logging.getLogger("apm_hf")

ABOUT_NOTE = "what the embedded pair does not know; null for others"

# The RESULT of `apm islands` and `apm interpolate`.
RESULT = {
    "files": "pictures, and films where there are any",
    "model": "as given; null is the embedded one, or a fresh one",
    "teacher": "as given; null is the embedded one, or none",
    "note": ABOUT_NOTE,
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
        "note": note(options),
        "num_parameters": pair.bare_model.num_parameters(only_trainable=True),  # without a teacher inside
        "fitted": fitted,
        "errors": [],
    }


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that [`load_pair`] reads."""
    add(parser, "--model", "distilled; by default, without --teacher, the embedded one")
    add(parser, "--teacher", "alone, with its dense student in the package, or a fresh one that is fitted")
    parser.add_argument(
        "--fresh", action="store_true", help="fit a fresh student, to the embedded teacher if none is named"
    )


def load_pair(options: argparse.Namespace, *, local_patch: bool = True, dense: bool = False) -> "APM":
    """Load what the options name; without a model, the teacher's dense student in the package, or a fresh one.

    Args:
        local_patch: whether a fresh student sees the pixels around each location.
        dense: whether a dense student will do, which cannot be fitted to anything.

    Raises:
        ValueError: as [`APM.load`] does, and for `--fresh` beside `--model`.
    """
    from ..pair import APM

    if options.fresh and options.model is not None:
        raise ValueError("--fresh: expected no --model beside it")
    pair = APM.load(options.model, teacher=options.teacher)
    if options.model is not None:
        return pair
    if dense and not options.fresh:
        if pair.is_embedded:
            return pair
        if (found := pair.with_dense_student()) is not None:
            logger.info("no --model: the dense student of this teacher in the package; --fresh fits one to the photo")
            return found
    return pair.fresh(local_patch=local_patch, seed=options.seed)


def note(options: argparse.Namespace) -> str | None:
    """Return what the embedded pair does not know, where the options name no other; else None."""
    from ..pair import EMBEDDED_NOTE

    return EMBEDDED_NOTE if options.teacher is None and options.model is None else None


def caption(pair: "APM", what: str) -> str:
    """Say below a picture how large the student is, what was done with it, and which teacher it has."""
    size = f"{pair.bare_model.num_parameters(only_trainable=True) / 1e6:.1f} M parameters"
    teacher = pair.teacher
    if teacher is None:
        return f"APM, {size}, {what}"
    name = "the embedded one" if pair.is_embedded else teacher.name.rstrip("/").rpartition("/")[2]
    return f"APM, {size}, {what}; teacher: {name}"
