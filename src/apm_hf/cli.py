"""The `apm` command.

apm demo                                                   # distil, adapt, look: no network, two minutes
apm classify PHOTO --teacher openai/clip-vit-large-patch14 --labels FILE
apm evaluate --suite smoke --output_dir DIR                # every method on drawn scenes: no network
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .demo_assets import DEMO_MODEL, DEMO_TEACHER

if TYPE_CHECKING:
    from .ttt_classification import TTTClassifier

logger = logging.getLogger("apm_hf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 1 where something failed, 2 for wrong usage."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    arguments = sys.argv[1:] if arguments is None else arguments
    parsed = _parser().parse_args(arguments, argparse.Namespace(arguments=arguments))
    try:
        return parsed.run(parsed)
    except (ValueError, OSError, ImportError) as error:
        # What the user can mend is one line; anything else is a defect of ours and keeps its traceback.
        logger.error(f"apm {parsed.command}: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="apm", description="The Asynchronous Perception Machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="distil an APM, adapt it to corrupted images, draw what it sees, save it")
    _add_demo_options(demo)
    demo.set_defaults(run=_demo)
    classify = commands.add_parser("classify", help="adapt to photos and classify them, the teacher beside the APM")
    _add_classify_options(classify)
    classify.set_defaults(run=_classify)
    evaluate = commands.add_parser("evaluate", help="an APM beside its teacher and other label-free methods: a report")
    _add_evaluate_options(evaluate)
    evaluate.set_defaults(run=_evaluate)
    return parser


def _add_demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", default=DEMO_TEACHER, help="name or folder; by default the one in this package")
    parser.add_argument("--dataset", help="name, folder or parquet file; by default the embedded scenes")
    parser.add_argument("--output_dir", default="apm", help="where the model goes (default: %(default)s)")
    parser.add_argument("--report_dir", help="where the pictures go (default: OUTPUT_DIR_report)")
    parser.add_argument("--max_steps", type=int, help="steps of distillation")
    parser.add_argument("--num_images", type=int, help="images to distil from")
    parser.add_argument("--num_test_images", type=int, help="held-out images to measure on")
    parser.add_argument("--seed", type=int, default=0)


def _demo(options: argparse.Namespace) -> int:
    from .demo import DemoConfig, run_demo

    given = {name: value for name in DemoConfig.__annotations__ if (value := getattr(options, name)) is not None}
    if options.teacher == DEMO_TEACHER:
        logger.info("no --teacher: the tiny one of this package is used, and no network")
    result = run_demo(DemoConfig(**given))
    logger.info(result.table)
    logger.info("pictures and report: " + ", ".join(map(str, result.files)))
    logger.info(f"model: {result.output_dir}  (AutoModel.from_pretrained({str(result.output_dir)!r}))")
    return 0


def _add_classify_options(parser: argparse.ArgumentParser) -> None:
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


def _classify(options: argparse.Namespace) -> int:
    from .data.images import decode_image, eight_bit_rgb

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

    from .teachers import DEFAULT_TEMPLATES, load_teacher
    from .ttt import TTTConfig
    from .ttt_classification import TTTClassifier
    from .zero_shot import read_labels

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
        from .data.scenes import CLASS_NAMES

        return list(CLASS_NAMES)
    if teacher.class_names is None:
        raise ValueError(
            f"--labels: expected a file of class names, since {options.teacher} has no classes of its own"
        )
    return teacher.class_names


def _print_predictions(classifier: "TTTClassifier", batch: list[tuple[str, Any]], top_k: int) -> None:
    from .zero_shot import topk

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


def _add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", default="smoke", help="smoke, photos, ood, fine_grained or custom")
    parser.add_argument("--output_dir", required=True, help="of results and report; an interrupted run goes on there")
    parser.add_argument("--data", nargs="+", default=[], help="benchmarks, folders or NAME=FOLDER")
    parser.add_argument("--teacher", nargs="+", default=[], dest="teachers", help="names or folders")
    parser.add_argument("--model", help="a distilled APM, as wide as the teacher")
    parser.add_argument("--methods", nargs="+", default=[], help="of the suite's, those to run; or any, of custom")
    parser.add_argument("--corruptions", nargs="+", default=[], help="instead of the suite's")
    parser.add_argument("--severities", nargs="+", type=int, default=[], help="1 to 5, instead of the suite's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="instead of 0")
    parser.add_argument("--max_images", type=int, help="of every cell, instead of the suite's")
    parser.add_argument("--batch_size", type=int, default=16, help="images at a time (default: %(default)s)")
    parser.add_argument("--num_views", type=int, default=16, help="of methods that look at several")
    parser.add_argument("--allow_chance", action="store_true", help="even where labels look like another data set's")


def _evaluate(options: argparse.Namespace) -> int:
    from .evaluation.suites import evaluate
    from .processes import command_line

    given = {name: value for name, value in vars(options).items() if name not in ("command", "run", "arguments")}
    folder = evaluate(**given, command=command_line("apm", options.arguments))
    logger.info(f"report: {folder / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
