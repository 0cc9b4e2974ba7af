"""`apm distill`: a teacher and images in, a model folder with its card out, on one CPU or many GPUs."""

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .options import SHARED, add

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..distillation import DistillationResult
    from ..distillation.dense import DenseConfig
    from ..distillation.recipe import TrainingConfig

HELP = "train a small model, an APM, to reproduce a teacher's features on your images"
DESCRIPTION = """
Distil a teacher into an APM on your images and save it with its image processor and a card; --push_to_hub publishes
it too. The same command runs under `torchrun --nproc_per_node N -m apm_hf.commands.main distill ...` and under
`accelerate launch -m apm_hf.commands.main distill ...`.
"""
EXAMPLES = (
    "apm distill --teacher openai/clip-vit-base-patch16 --dataset photos/ --output_dir runs/photos",
    "apm distill --teacher facebook/dinov2-with-registers-large --preset dinov2-large --cls_weight 0 \\\n"
    "      --dataset detection-datasets/coco --image_processor '{\"do_min_max\": true}' --output_dir runs/coco",
    "apm distill --teacher openai/clip-vit-base-patch16 --dataset photos/ --output_dir runs/photos --resume",
)
RESULT = {
    "output_dir": "folder of the model, for AutoModel.from_pretrained",
    "steps": "optimiser steps",
    "processes": "that took part",
    "num_parameters": "of the APM",
    "metrics": "of every validation: step, feature_r2, mean_r2, position_r2, ridge_r2, feature_cosine, mean_cosine, "
    "embed_cosine, ...",
    "verdict": "which controls the student is above",
    "warning": "why the student should not be used, else null",
    "url": "of the commit with --push_to_hub, else null",
}
INTERRUPTED = "with --resume the same command goes on from its last checkpoint, if there is one (--checkpoint_steps)"
SMALLER = "a smaller --batch_size (with --gradient_accumulation_steps as much larger) or --num_locations"


def add_options(parser: argparse.ArgumentParser) -> None:
    from transformers import HfArgumentParser
    from transformers.hf_argparser import string_to_bool

    from ..configuration_apm import PRESETS
    from ..distillation import DistillationConfig, settings
    from ..distillation.recipe import TrainingConfig

    add(parser, "--config")
    source = HfArgumentParser((TrainingConfig, DistillationConfig), add_help=False)
    for action in source._actions:
        name = action.option_strings[0]  # others, with hyphens, are forms that every command understands
        if action.nargs == "?" and action.default is False:
            parser.add_argument(name, action="store_true", help=action.help)
            continue
        if action.type is string_to_bool:
            options = {"type": string_to_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
            parser.add_argument(name, help=action.help, **options)
            continue
        metavar = "JSON" if (action.help or "").startswith("JSON") else "NAME" if action.type is str else None
        help = action.help
        if name[2:] in settings.PRESETS["student"]:
            own = settings.PRESETS["student"][name[2:]]
            help = f"{help} (default: {own} with the preset student, {action.default} with others)"
        parser.add_argument(
            name,
            type=action.type,
            nargs=action.nargs,
            default=action.default,
            required=action.required,
            choices=sorted(PRESETS) if name == "--preset" else action.choices,
            metavar=SHARED[name]["metavar"] if name in SHARED else metavar,
            help=help,
        )


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    from ..distillation import DistillationConfig
    from ..distillation.recipe import TrainingConfig, train
    from ..distillation.validation import verdict, worse_than_constant
    from ..runs.processes import command_line

    settings: DistillationConfig | DenseConfig
    training = TrainingConfig(**{field.name: getattr(options, field.name) for field in fields(TrainingConfig)})
    if training.preset == "dense":
        settings = _dense_settings(options)
    else:
        own = {field.name for field in fields(DistillationConfig)} & options.given
        settings = DistillationConfig.preset(options.preset, **{name: getattr(options, name) for name in own})
    result = train(training, settings, command=command_line("apm", options.arguments))
    if not result.is_main_process:
        return None
    metrics = result.distillation.metrics[-1] if result.distillation.metrics else {}
    said, warning = verdict(metrics), worse_than_constant(metrics)
    print("\n".join(_summary(training, result.distillation, metrics)))
    if training.push_to_hub and result.address is None:
        again = f"apm push {result.distillation.output_dir} {training.hub_model_id} --force"
        raise ValueError(f"not published, since the card warns of this model; `{again}` publishes it all the same")
    return {
        "output_dir": result.distillation.output_dir,
        "steps": result.distillation.steps,
        "processes": result.num_processes,
        "num_parameters": result.distillation.student.num_parameters(),
        "metrics": result.distillation.metrics,
        "verdict": said or None,
        "warning": warning,
        "url": result.address,
    }


def _summary(
    training: "TrainingConfig", result: "DistillationResult", metrics: "Mapping[str, float]"
) -> "Iterator[str]":
    """Yield the last lines of a run: folder, figures, and what to do next."""
    from ..distillation.validation import comparison, verdict, worse_than_constant

    folder, count = result.output_dir, result.student.num_parameters(only_trainable=True) / 1e6
    yield f"{folder}: a student of {count:.1f} M parameters after {result.steps} steps"
    if rows := comparison(metrics):
        yield "R² on held-out images, after the mean of every position is removed:"
        yield from (f"  {title:<24}{value:7.3f}" for title, value in rows)
        yield f"That is, {verdict(metrics)}."
    for name in sorted(name for name in metrics if name.endswith("/feature_r2")):
        yield f"  {name.partition('/')[0]:<24}{metrics[name]:7.3f}, of this additional teacher"
    if warning := worse_than_constant(metrics):
        yield f"Do not use it: {warning}."
    yield f"next: apm islands PHOTO --model {folder} --teacher {training.teacher} --output_dir islands"
    if not warning:
        yield f"      apm push {folder} USER/NAME"


def _dense_settings(options: argparse.Namespace) -> "DenseConfig":
    """Return the settings that were given; others have the defaults of a dense student, not those in the help.

    Raises:
        ValueError: for an option of other distillations.
    """
    from ..distillation import DistillationConfig
    from ..distillation.dense import DenseConfig

    known, others = ({field.name for field in fields(kind)} for kind in (DenseConfig, DistillationConfig))
    if unknown := sorted(options.given & others - known):
        raise ValueError(f"--{unknown[0]}: expected none with --preset dense")
    return DenseConfig(**{name: getattr(options, name) for name in known & options.given})
