"""`apm classify`: photos in, the teacher's and the adapted students' predictions out."""

import argparse
import logging
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .console import printable
from .options import add
from .pairs import ABOUT_NOTE, ABOUT_TEACHER, add_teacher_option, load, note, teacher_name

if TYPE_CHECKING:
    from ..pair import APM
    from ..ttt.classification import TTTClassifier

logger = logging.getLogger("apm_hf")

HELP = "adapt to photos and classify them, the teacher beside the APM"
DESCRIPTION = """
Adapt an APM to each photo at test time and classify it zero-shot, the teacher's own answer beside it: a student that
is fitted to the end repeats its teacher. With --teacher alone a fresh student is fitted. Without --teacher and --model
a public one is fetched from the Hub once, and said; where that is out of reach, a small teacher of photos in this
package is used, which knows the kinds of Caltech-101 and some everyday words: --teacher embedded.
"""
EXAMPLES = (
    "apm classify photo.jpg --teacher openai/clip-vit-large-patch14 --labels classes.txt",
    "apm classify *.png --model user/apm-photos --teacher openai/clip-vit-base-patch16 --labels classes.txt --json",
)
RESULT = {
    "teacher": ABOUT_TEACHER,
    "model": "as given; null is a fresh one",
    "note": ABOUT_NOTE,
    "labels": "those that are ranked; what the teacher has no words for is left out",
    "photos": "a list: photo, steps, loss (at the first and the last step), cosine (to the teacher's embedding), "
    "agrees (on the first class), seconds, and teacher and apm: the --top_k classes as label and score",
    "errors": "a list: photo and message, of those that could not be read, or whose fit diverged",
}
INTERRUPTED = "what is printed is done; start again with the other photos"
SMALLER = "a smaller --batch_size"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image files, folders or patterns")
    add_teacher_option(parser)
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="of class names, one a line or a JSON list; else the teacher's classes",
    )
    add(parser, "--model", "the one to adapt; by default, or of a dense one, a fresh one as wide as the teacher")
    add(parser, "--preset", "of the adaptation", choices=("fast", "paper"), default="fast")
    add(parser, "--steps", "instead of the preset's")
    parser.add_argument(
        "--template", metavar="TEXT", action="append", help="prompt with {} for the class name; may be repeated"
    )
    parser.add_argument("--top_k", type=int, default=5, help="classes to print")
    add(parser, "--batch_size", "adapted to at once", default=4)
    add(parser, "--seed", default=0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from ..data.folders import find_photos
    from ..data.images import decode_image, eight_bit_rgb

    for name in ("batch_size", "top_k"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected a positive number, got {getattr(options, name)}")
    (pair, classifier), names = _classifier(options), find_photos(options.photos)
    photos: list[dict[str, Any]] = []
    errors: list[dict[str, str]] = []

    def report(name: str, message: str) -> None:
        logger.error(f"apm classify: {printable(f'{name}: {message}')}")
        errors.append({"photo": name, "message": message})

    for start in range(0, len(names), options.batch_size):
        readable = []
        for name in names[start : start + options.batch_size]:
            try:
                readable.append((name, eight_bit_rgb(decode_image(name))))
            except ValueError as error:
                report(name, str(error))
        for entry in _classify(classifier, readable, options.top_k) if readable else ():
            _print(entry)
            photos.append(entry)
            if not entry["apm"]:
                report(entry["photo"], "the fit diverged, so that there are the teacher's scores alone")
    return {
        "teacher": teacher_name(pair),
        "model": options.model,
        "note": note(pair),
        "labels": classifier.class_names,
        "photos": photos,
        "errors": errors,
    }


def _classifier(options: argparse.Namespace) -> "tuple[APM, TTTClassifier]":
    from ..teachers import DEFAULT_TEMPLATES
    from ..teachers.zero_shot import read_labels, same_words
    from ..ttt import TTTConfig

    overrides: dict[str, Any] = {"seed": options.seed, "start": "model"}
    if options.steps is not None:
        overrides["steps"] = options.steps
    config = TTTConfig.preset(options.preset, **overrides)
    labels = None if options.labels is None else read_labels(options.labels)
    if options.teacher is None and options.model is not None:
        raise ValueError("--teacher: expected the one that --model was distilled from, got none")
    pair = load(options, "words")
    labels = labels or pair.default_labels
    if not labels:
        raise ValueError(
            f"--labels: expected a file of class names, since {teacher_name(pair)} has no classes of its own"
        )
    labels = _known(pair.teacher, labels)
    classifier = pair.classifier(labels, config=config, templates=options.template or DEFAULT_TEMPLATES)
    for names in (same := same_words(classifier.text_embeds, labels)):
        logger.warning(f"the teacher cannot tell apart: {printable(', '.join(names))}; their order means nothing")
    if len(labels) > 1 and len(same) == 1 and len(same[0]) == len(labels):
        raise ValueError("--labels: expected words that the teacher can tell apart, got none")
    return pair, classifier


def _known(teacher: Any, labels: list[str]) -> list[str]:
    """Return the labels that the teacher has words for; the others, to it all the same, are named and left out.

    Raises:
        ValueError: where there are none.
    """
    unknown = teacher.unknown_labels(labels)
    known = [label for label in labels if label not in unknown]
    if not known:
        raise ValueError(f"--labels: expected words that the teacher knows, got none: {', '.join(labels[:5])}")
    if unknown:
        logger.warning(f"left out, since the teacher has no words for them: {printable(', '.join(unknown))}")
    return known


def _classify(classifier: "TTTClassifier", batch: list[tuple[str, Any]], top_k: int) -> list[dict[str, Any]]:
    from ..teachers.zero_shot import topk

    started = time.perf_counter()
    result = classifier([image for _, image in batch])
    seconds = (time.perf_counter() - started) / len(batch)
    top_k = min(top_k, len(classifier.class_names))
    teachers, sound = topk(result.teacher_logits, classifier.class_names, top_k), result.logits.isfinite().all(dim=1)
    adapted = iter(topk(result.logits[sound], classifier.class_names, top_k))
    entries = []
    for index, (name, _) in enumerate(batch):
        losses = result.adapted.losses[index]
        steps = int(result.adapted.steps[index])  # a stop rule may have ended the fit, but not before the first loss
        entries.append(
            {
                "photo": name,
                "steps": steps,
                "loss": [float(losses[0]), float(losses[min(steps, len(losses) - 1)])],
                "cosine": result.target_cosine[index].item(),
                "agrees": bool(result.agreement[index]),
                "seconds": seconds,
                "teacher": [asdict(prediction) for prediction in teachers[index]],
                "apm": [asdict(prediction) for prediction in next(adapted)] if sound[index] else [],
            }
        )
    return entries


def _print(entry: dict[str, Any]) -> None:
    print(printable(entry["photo"]))
    print(
        f"  {entry['steps']} steps: loss {entry['loss'][0]:.4f} -> {entry['loss'][1]:.4f}, cosine to the teacher's "
        f"embedding {entry['cosine']:.4f}, {entry['seconds']:.2f} s"
    )
    print(f"  {'teacher':<38}  APM adapted to this photo")
    for row, left in enumerate(entry["teacher"]):
        line = f"  {left['score']:6.1%} {printable(left['label'])[:30]:<31}"
        if entry["apm"]:
            right = entry["apm"][row]
            line += f"  {right['score']:6.1%} {printable(right['label'])[:30]}"
        print(line)
