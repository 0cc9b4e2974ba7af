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

ABOUT_NOTE = "what the embedded teacher does not know; null for others"
ABOUT_TEACHER = "name; embedded is the one in the package, null none"

# The RESULT of `apm islands` and `apm interpolate`.
RESULT = {
    "files": "pictures, and films where there are any",
    "model": "as given; null is the embedded one, or a fresh one",
    "teacher": ABOUT_TEACHER,
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
        "teacher": teacher_name(pair),
        "note": note(pair),
        "num_parameters": pair.bare_model.num_parameters(only_trainable=True),  # without a teacher inside
        "fitted": fitted,
        "errors": [],
    }


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that [`load_pair`] reads."""
    add(parser, "--model", "distilled; by default, the teacher's dense student in the package, or a fresh one")
    add_teacher_option(parser)
    parser.add_argument("--fresh", action="store_true", help="fit a fresh student to the teacher's features")


def add_teacher_option(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Add the option that [`load`] reads beside `--model`."""
    known = "by default a public one, or the one in this package where the Hub is out of reach"
    add(parser, "--teacher", f"{more}; {known}" if more else known)


def load(options: argparse.Namespace, task: str) -> "APM":
    """Load what the options name or, where they name nothing, the public teacher for this task or the embedded pair.

    What the embedded teacher does not know is printed.

    Args:
        task: one of `apm_hf.teachers.defaults.HUB_TEACHERS`.

    Raises:
        ValueError, OSError: as [`APM.load`] does.
    """
    from ..assets import PHOTO_MODEL, PHOTO_TEACHER
    from ..pair import APM
    from ..teachers.defaults import default_teacher

    if options.model is not None or options.teacher is not None:
        pair = APM.load(options.model, teacher=options.teacher)
    elif (teacher := default_teacher(task)) is not None:
        pair = APM.load(teacher=teacher)
    else:
        pair = APM.load(PHOTO_MODEL, teacher=PHOTO_TEACHER)
        print("no teacher named, and the Hub's is neither in the cache nor in reach: the one in this package is taken")
    if (said := note(pair)) is not None:
        print(said)
    return pair


def load_pair(
    options: argparse.Namespace, task: str = "locations", *, local_patch: bool = True, dense: bool = False
) -> "APM":
    """Load what the options name; without a model, the teacher's dense student in the package, or a fresh one.

    Args:
        task: see [`load`].
        local_patch: whether a fresh student sees the pixels around each location.
        dense: whether a dense student will do, which cannot be fitted to anything.

    Raises:
        ValueError: as [`APM.load`] does, and for `--fresh` beside `--model`.
    """
    if options.fresh and options.model is not None:
        raise ValueError("--fresh: expected no --model beside it")
    pair = load(options, task)
    if options.model is not None:
        return pair
    if dense and not options.fresh:
        if pair.is_embedded:
            return pair
        if (found := pair.with_dense_student()) is not None:
            logger.info("no --model: the dense student of this teacher in the package; --fresh fits one to the photo")
            return found
        logger.info("no --model: a small student is fitted to the photo")
    return pair.fresh(local_patch=local_patch, seed=options.seed)


def note(pair: "APM") -> str | None:
    """Return what the embedded teacher does not know; None for others."""
    from ..pair import EMBEDDED_NOTE

    return EMBEDDED_NOTE if pair.has_embedded_teacher else None


def teacher_name(pair: "APM") -> str | None:
    """Return the name by which the teacher can be given again; None where there is none."""
    from ..assets import EMBEDDED

    if pair.teacher is None:
        return None
    return EMBEDDED if pair.has_embedded_teacher else pair.teacher.name


def caption(pair: "APM", what: str) -> str:
    """Say below a picture how large the student is, what was done with it, and which teacher it has."""
    size = f"{pair.bare_model.num_parameters(only_trainable=True) / 1e6:.1f} M parameters"
    teacher = pair.teacher
    if teacher is None:
        return f"APM, {size}, {what}"
    name = "the embedded one" if pair.has_embedded_teacher else teacher.name.rstrip("/").rpartition("/")[2]
    return f"APM, {size}, {what}; teacher: {name}"
