"""Distil from names: a teacher, a data set and settings in; a model folder with its card out.

This is what `apm distill` does. [`apm_hf.distillation.distill`] takes objects instead.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from transformers import set_seed
from transformers.utils import logging

from ..configuration_apm import APMConfig
from ..data.augmentation import RandomCrops
from ..data.images import ImageCollator
from ..data.loading import train_and_validation
from ..data.split_streams import SplitStream
from ..modeling_apm import APMModel
from ..pair import APM
from ..publishing.cards import CardFacts, card_photos, write_card, write_card_picture
from ..publishing.hub import publish
from ..publishing.zero_shot import check_text, save_with_text
from ..runs.identity import images_digest
from ..runs.processes import process_state
from ..runs.run import Run, own_folder
from ..runs.unreadable_images import numbered
from ..teachers import load_teacher
from ..teachers.feature_cache import CachedImages, FeatureCache
from ..teachers.licenses import inherit
from ..teachers.matching import matching_image_processor, same_view
from .dense import DenseConfig, DensePairs, distill_dense
from .loop import distill
from .resuming import make_room
from .settings import DistillationConfig, DistillationResult
from .validation import card_figures

logger = logging.get_logger(__name__)

CardPhotos = tuple[list[Image.Image], str]  # photos for the card, and what they are: none, and ""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Configure what is distilled, into what, on which images; the names are also the options of `apm distill`."""

    teacher: str = field(
        metadata={"help": "teacher, a Hub name or a folder; the frozen model to reproduce, e.g. facebook/dinov2-small"}
    )
    extra_teachers: list[str] = field(
        default_factory=list, metadata={"help": "additional teachers, each predicted by an output head of this name"}
    )
    teacher_dtype: str | None = field(default=None, metadata={"help": "precision of the teacher, e.g. bfloat16"})
    dataset: str = field(
        metadata={"help": "images, a Hub dataset, a folder, parquet or tar files; org/name, or org/name:config"}
    )
    feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "teacher's features stored by `apm cache-features`; the teacher is not run on training images then"
        },
    )
    preset: str = field(
        default="student",
        metadata={
            "help": "ready-made settings; student reads local columns of pixels, dense refines the teacher's tokens, "
            "both with defaults of their own; others, such as paper, have the paper's recipe"
        },
    )
    config_overrides: str = field(
        default="{}", metadata={"help": "JSON: fields of APMConfig, e.g. '{\"local_patch\": true}'"}
    )
    image_processor: str = field(
        default="{}", metadata={"help": "JSON: options of APMImageProcessor, e.g. '{\"do_min_max\": true}'"}
    )
    split: str | None = field(default=None, metadata={"help": "split of the data set; to train on, found by default"})
    validation_split: str | None = field(
        default=None,
        metadata={"help": "split to validate on; by default the data set's, or a held-out part of the training split"},
    )
    image_column: str | None = field(default=None, metadata={"help": "column that holds the images, found by default"})
    label_column: str | None = field(
        default=None, metadata={"help": "column that holds the labels, found by default; training does not use them"}
    )
    random_crops: bool | None = field(
        default=None,
        metadata={"help": "train on random crops, mirrored half the time; by default with the preset student alone"},
    )
    streaming: bool = field(default=False, metadata={"help": "read the dataset while training"})
    max_images: int | None = field(default=None, metadata={"help": "use at most this many images; for training"})
    max_validation_images: int = field(default=256, metadata={"help": "use at most this many images for validation"})
    with_text: bool = field(
        default=False,
        metadata={"help": "save the text tower of a CLIP-like teacher too, for zero-shot classification"},
    )
    card_images: list[str] = field(
        default_factory=list,
        metadata={"help": "photos for the card that may be published; by default, two of scikit-image's"},
    )
    push_to_hub: bool = field(default=False, metadata={"help": "publish the result, with its card"})
    hub_model_id: str | None = field(default=None, metadata={"help": "repository, user/name"})


@dataclass(frozen=True)
class TrainingResult:
    """Hold the result of a run that was started from names.

    Args:
        distillation: the student, its figures, and where it was saved.
        num_processes: that it took.
        is_main_process: whether this is the one that wrote card and model.
        address: of the commit; None where the result was not published, also since its card warns of it.
    """

    distillation: DistillationResult
    num_processes: int
    is_main_process: bool
    address: str | None


def train(training: TrainingConfig, config: DistillationConfig | DenseConfig, *, command: str) -> TrainingResult:
    """Load, distil, save with a card, and publish where `push_to_hub` says so.

    Args:
        config: a [`DenseConfig`] for the preset `dense`, and for that alone.
        command: what the card says made the model, e.g. [`apm_hf.runs.processes.command_line`].

    Raises:
        ValueError: for settings, data or a teacher that do not go together.
        OSError: for a teacher or data that cannot be reached.
    """
    if isinstance(config, DenseConfig) != (training.preset == "dense"):
        raise ValueError(f"config: expected a DenseConfig for the preset dense alone, got {type(config).__name__}")
    if training.push_to_hub and training.hub_model_id is None:
        raise ValueError("--push_to_hub: expected --hub_model_id user/name, got none")
    if training.random_crops and training.streaming:
        raise ValueError("--random_crops: expected a data set that is not streamed")
    if training.streaming and config.max_steps is None:
        raise ValueError("--max_steps: expected a number with --streaming, since a stream's length is not known")
    if isinstance(config, DenseConfig):
        _refuse_others(training)
    elif training.feature_cache is not None:
        _check_cacheable(training, config)
    if wrong := [one for one in training.extra_teachers if "=" not in one]:
        raise ValueError(f"--extra_teachers: expected NAME=TEACHER, got {wrong}")
    folders = {"teacher": training.teacher, "dataset": training.dataset, "feature_cache": training.feature_cache}
    own_folder(config.output_dir, **folders)  # before anything is fetched
    resumes = isinstance(config, DistillationConfig) and config.resume
    if not resumes and not config.overwrite:
        make_room(Run(config.output_dir, process_state()), overwrite=False)  # refuses a folder with a run
    photos = _card_photos(training)
    overrides, processor_options = (_json_object(training, name) for name in ("config_overrides", "image_processor"))
    if isinstance(config, DenseConfig):
        return _train_dense(training, config, overrides, photos, command=command)
    set_seed(config.seed)
    # Each process's own device: of several GPUs "cuda" alone is the first one until Accelerate has shared them out.
    placed = {"device": process_state().device, "dtype": training.teacher_dtype}
    teacher = load_teacher(training.teacher, **placed)
    names = dict(one.split("=", 1) for one in training.extra_teachers)
    teachers = {head: load_teacher(name, **placed) for head, name in names.items()}
    overrides = {"feature_size": teacher.feature_size, **overrides}
    if teachers:
        heads = {head: {"feature_size": one.feature_size} for head, one in teachers.items()}
        overrides = {"teacher_heads": heads, **overrides}
    if config.level_layers:
        overrides = {"num_levels": len(config.level_layers), "level_size": teacher.hidden_size, **overrides}
    student = APMModel(APMConfig.preset(training.preset, **overrides))
    if training.with_text:
        check_text(teacher, student.config)
    inherit(student.config, [teacher, *teachers.values()], dataset=training.dataset)
    image_processor = matching_image_processor(teacher, student.config.image_size, **processor_options)
    data, validation = train_and_validation(
        training.dataset,
        split=training.split,
        validation_split=training.validation_split,
        image_column=training.image_column,
        label_column=training.label_column,
        streaming=training.streaming,
        max_images=training.max_images,
        max_validation_images=training.max_validation_images,
        seed=config.seed,
    )
    images, held_out, digest = data.dataset, numbered(validation.dataset), None
    if not training.streaming:
        digest = images_digest(images, data.image_column)
        held_out = numbered(validation.dataset, digest=images_digest(validation.dataset, validation.image_column))
    if training.streaming:
        whole = training.max_images is None and data.split == data.split.removesuffix("[rest]")
        images = SplitStream(images, name=training.dataset, seed=config.seed, whole=whole)
    by_number = not training.streaming and training.feature_cache is None
    if training.random_crops or (training.random_crops is None and training.preset == "student" and by_number):
        images = RandomCrops(images, data.image_column, seed=config.seed)
    rows = numbered(images, digest=digest)
    if training.feature_cache is not None:
        with process_state().main_process_first():  # the others find what it remembered
            cache = FeatureCache(training.feature_cache).verify()
        cache.check(teacher, images, image_column=data.image_column, level_layers=config.level_layers)
        rows = CachedImages(images, cache, image_column=data.image_column)
    result = distill(
        student,
        rows,
        config=config,
        image_processor=image_processor,
        teacher=teacher,
        teachers=teachers,
        validation_data=held_out,
        collate_fn=ImageCollator(
            image_processor,
            data.image_column,
            teacher_image_processor=teacher.image_processor,
            teacher_image_processors={head: same_view(one, teacher) for head, one in teachers.items()},
            max_unreadable_images=config.max_unreadable_images,
        ),
    )
    state, address = process_state(), None
    if state.is_main_process:
        shown = _draw_card_picture(result, APM(result.student, image_processor, teacher), photos)
        if training.with_text:
            save_with_text(result.student, teacher, image_processor, result.output_dir)
        address = _publish(training, config, result, command, shown)
    return TrainingResult(result, state.num_processes, state.is_main_process, address)


def _train_dense(
    training: TrainingConfig,
    config: DenseConfig,
    overrides: dict[str, Any],
    photos: CardPhotos,
    *,
    command: str,
) -> TrainingResult:
    """Distil a decoder of the teacher's tokens, see [`apm_hf.distillation.dense`]."""
    data, validation = train_and_validation(
        training.dataset,
        split=training.split,
        validation_split=training.validation_split,
        validation_fraction=0.1,
        image_column=training.image_column,
        max_images=training.max_images,
        max_validation_images=training.max_validation_images,
        seed=config.seed,
    )
    if len(validation.dataset) < 2:
        raise ValueError(f"--dataset: expected 20 photos or more, or --validation_split, got {len(data.dataset) + 1}")
    state = process_state()
    teacher = load_teacher(training.teacher, device=state.device, dtype=training.teacher_dtype)
    train_pairs = DensePairs.build(data.photos(), teacher, seed=config.seed, description="teacher")
    held_out = DensePairs.build(validation.photos(), teacher, shifted=False, description="teacher, held out")
    result = distill_dense(teacher, train_pairs, held_out, config, dataset=training.dataset, **overrides)
    metrics = [{"step": config.max_steps, **result.metrics}]
    found = DistillationResult(result.student, metrics, result.output_dir, config.max_steps)
    address = None
    if state.is_main_process:
        shown = _draw_card_picture(found, APM(found.student, train_pairs.image_processor, teacher), photos)
        address = _publish(training, config, found, command, shown)
    return TrainingResult(found, state.num_processes, state.is_main_process, address)


def _publish(
    training: TrainingConfig,
    config: DistillationConfig | DenseConfig,
    result: DistillationResult,
    command: str,
    photos: str,
) -> str | None:
    """Write the model's card and, where `push_to_hub` asks for it, upload its folder; return the commit's address."""
    facts = _facts(training, config, result, command, photos)
    write_card(result.output_dir, facts)
    if not training.push_to_hub:
        return None
    assert training.hub_model_id is not None
    if facts.warning:
        return None
    address = publish(result.output_dir, training.hub_model_id)
    logger.info(address)
    return address


def _refuse_others(training: TrainingConfig) -> None:
    """Refuse options that the dense preset has no use for, instead of ignoring them."""
    names = ("extra_teachers", "feature_cache", "random_crops", "streaming", "with_text")
    given = [name for name in names if getattr(training, name)]
    if training.image_processor != "{}":
        given.append("image_processor")
    if given:
        raise ValueError(f"--{given[0]}: expected none with --preset dense")


def _check_cacheable(training: TrainingConfig, config: DistillationConfig) -> None:
    """Refuse settings that need other outputs of the teacher than a cache holds."""
    for name, given in (("random_crops", training.random_crops), ("jitter", config.jitter)):
        if given:
            raise ValueError(
                f"--{name}: expected none with --feature_cache, which holds fixed views; apm cache-features --views "
                "makes them of crops"
            )
    if training.streaming:
        raise ValueError("--feature_cache: expected a data set that is not streamed: features are found by row")


def _draw_card_picture(result: DistillationResult, apm: APM, photos: CardPhotos) -> str:
    """Draw the photos for the card, and return what its picture shows; empty where it has none."""
    pictures, what = photos
    if not pictures:
        return ""
    device = apm.bare_model.device
    try:
        if apm.teacher is not None:
            apm.bare_model.to(apm.teacher.device)
        write_card_picture(result.output_dir, apm, pictures)
    except ImportError as error:
        logger.warning(f"the card goes without a picture: {error}")
        return ""
    finally:
        apm.bare_model.to(device)
    return what


def _card_photos(training: TrainingConfig) -> CardPhotos:
    try:
        return card_photos(training.card_images)
    except ImportError as error:
        logger.warning(f"the card goes without a picture: {error}; --card_images gives photos of yours")
        return [], ""


def _facts(
    training: TrainingConfig,
    config: DistillationConfig | DenseConfig,
    result: DistillationResult,
    command: str,
    photos: str,
) -> CardFacts:
    last = {name: value for name, value in result.metrics[-1].items() if name != "step"} if result.metrics else {}
    return CardFacts(
        repo_id=training.hub_model_id or config.output_dir,
        teacher=training.teacher,
        dataset=training.dataset,
        command=command,
        steps=result.steps,
        num_parameters=result.student.num_parameters(only_trainable=True),
        **card_figures(last),
        photos=photos,
    )


def _json_object(training: TrainingConfig, name: str) -> dict[str, Any]:
    text = getattr(training, name)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name}: expected a JSON object, got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"--{name}: expected a JSON object, got {text!r}")
    return value
