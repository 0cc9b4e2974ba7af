"""`apm classify`: photos in, the teacher's and the adapted machines' predictions out."""

import argparse
import logging
import time
from typing import TYPE_CHECKING, Any

from ..demo_assets import DEMO_MODEL, DEMO_TEACHER

if TYPE_CHECKING:
    from ..ttt_classification import TTTClassifier

logger = logging.getLogger("apm_hf")

HELP = "adapt to photos and classify them, the teacher beside the APM"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image files")
    parser.add_argument("--teacher", help="name or folder; by default the one in this package")
    parser.add_argument("--labels", help="file of class names, one a line or a JSON list; else the teacher's classes")
    parser.add_argument("--model", help="APM to adapt; with --teacher alone, a fresh one as wide as the teacher")
    parser.add_argument("--preset", default="fast", help="recipe: paper, reference or fast (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="gradient steps, instead of the recipe's")
    parser.add_argument("--template", action="append", help="prompt with {} for the class name; may be repeated")
    parser.add_argument("--top_k", type=int, default=5, help="classes to print (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=4, help="photos adapted to at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    from ..data.images import decode_image, eight_bit_rgb

    for name in ("batch_size", "top_k"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected a positive number, got {getattr(options, name)}")
    classifier = _classifier(options)
    status, readable = 0, []
    for name in options.photos:
        try:
            readable.append((name, eight_bit_rgb(decode_image(name))))
        except ValueError as error:
            logger.error(f"apm classify: {name}: {error}")
            status = 1
    for start in range(0, len(readable), options.batch_size):
        batch = readable[start : start + options.batch_size]
        _print_predictions(classifier, batch, options.top_k)
    return status


def _classifier(options: argparse.Namespace) -> "TTTClassifier":
    from transformers import AutoModel
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from ..teachers import DEFAULT_TEMPLATES, load_teacher
    from ..ttt import TTTConfig
    from ..ttt_classification import TTTClassifier
    from ..zero_shot import read_labels

    teacher_name, model_name = options.teacher or DEMO_TEACHER, options.model
    overrides: dict[str, Any] = {"seed": options.seed}
    if options.steps is not None:
        overrides["steps"] = options.steps
    if options.teacher is None and model_name is None:
        model_name = DEMO_MODEL
        logger.info(
            "no --teacher and no --model: the demo's own, which are in this package and know drawn scenes only"
        )
    model = image_processor = None
    if model_name is not None:
        model = AutoModel.from_pretrained(model_name)
        image_processor = AutoImageProcessor.from_pretrained(model_name)
        overrides["start"] = "model"
    config = TTTConfig.preset(options.preset, **overrides)
    labels = read_labels(options.labels) if options.labels is not None else None
    teacher = load_teacher(teacher_name)
    if labels is None:
        labels = _default_labels(options, teacher)
    return TTTClassifier(
        teacher,
        labels,
        config=config,
        model=model,
        image_processor=image_processor,
        templates=options.template or DEFAULT_TEMPLATES,
    )


def _default_labels(options: argparse.Namespace, teacher: Any) -> list[str]:
    if options.teacher is None:
        from ..data.scenes import CLASS_NAMES

        return list(CLASS_NAMES)
    if teacher.class_names is None:
        raise ValueError(
            f"--labels: expected a file of class names, since {options.teacher} has no classes of its own"
        )
    return teacher.class_names


def _print_predictions(classifier: "TTTClassifier", batch: list[tuple[str, Any]], top_k: int) -> None:
    from ..zero_shot import topk

    started = time.perf_counter()
    result = classifier([image for _, image in batch])
    seconds = (time.perf_counter() - started) / len(batch)
    top_k = min(top_k, len(classifier.class_names))
    teachers = topk(result.teacher_logits, classifier.class_names, top_k)
    adapted = topk(result.logits, classifier.class_names, top_k)
    for index, (name, _) in enumerate(batch):
        losses = result.adapted.losses[index]
        print(f"{name}")
        print(
            f"  {len(losses)} steps: loss {losses[0]:.4f} -> {losses[-1]:.4f}, cosine to the teacher's embedding "
            f"{result.target_cosine[index]:.4f}, {seconds:.2f} s"
        )
        print(f"  {'teacher':<38}  adapted APM")
        for left, right in zip(teachers[index], adapted[index], strict=True):
            print(f"  {left.score:6.1%} {left.label[:30]:<31}  {right.score:6.1%} {right.label[:30]}")
