"""Run all steps on a few images: distil a teacher, adapt to corrupted images, compare with controls, draw.

By default everything is embedded: drawn part-whole scenes, and a tiny CLIP that was trained on them. The distilled APM
is compared with its teacher and two controls: an APM with random weights, and one distilled for as many steps from the
same targets assigned to the wrong images (shuffled targets).

Legend: B images, L locations, F feature width, K classes, (rows, cols) the teacher's grid.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from ..assets import DEMO_TEACHER, PHOTO_MODEL, PHOTO_TEACHER
from ..configuration_apm import APMConfig
from ..data.basic_corruptions import corrupt
from ..data.sample_photos import sample_photos
from ..data.scenes import CLASS_NAMES, SceneDataset
from ..distillation import DistillationConfig, distill, matching_image_processor
from ..modeling_apm import APMModel
from ..pair import APM
from ..position_encoding import grid_coordinates
from ..publishing.cards import CardFacts, write_card, write_card_picture
from ..runs.run import own_folder
from ..teachers import Teacher, load_teacher
from ..teachers.licenses import inherit
from ..teachers.targets import TargetCache
from ..teachers.zero_shot import classify, topk
from ..ttt import TTTConfig, adapt
from .report import ImagePanels, write_photo_page, write_report

logger = logging.get_logger(__name__)

CONDITIONS = ("clean", "gaussian_noise", "contrast", "jpeg", "defocus")
SEVERITY = 3
TEST_SEED = 1  # test scenes have another seed than training scenes

TEACHER, DISTILLED = "teacher", "APM, distilled"
ADAPTED, FROM_SCRATCH = "APM, distilled + TTT", "APM, TTT from random weights"
RANDOM, SHUFFLED = "control: random weights", "control: shuffled targets"

# Beside the names of the classes that the photo teacher learnt; most of them it has seen no labelled photo of.
OTHER_WORDS = ("cat", "dog", "coffee", "flower", "rocket", "palace", "house", "street")

COMMAND = "apm demo"  # in the card of every demo


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Configure the demo.

    Args:
        teacher: name or folder.
        dataset: name, folder or parquet file of labelled images; None is the embedded scenes.
        output_dir: the distilled model's folder.
        report_dir: the report's folder; None is `output_dir` with `_report` appended.
        max_steps: steps of distillation, also for the shuffled control.
        num_images: number of training images.
        num_test_images: number of held-out images to evaluate on and adapt to, per condition.
        seed: random seed of everything that is drawn.
    """

    teacher: str = DEMO_TEACHER
    dataset: str | None = None
    output_dir: str = "apm"
    report_dir: str | None = None
    max_steps: int = 640
    num_images: int = 4096
    num_test_images: int = 96
    seed: int = 0


@dataclass(frozen=True)
class DemoResult:
    """Hold the demo's results.

    Args:
        rows: the table: method -> column -> value; accuracies and cosines.
        table: the table in Markdown.
        files: files written to the report's folder.
        output_dir: the model's folder.
    """

    rows: dict[str, dict[str, float]]
    table: str
    files: list[Path]
    output_dir: Path


def run_demo(config: DemoConfig) -> DemoResult:
    """Distil, adapt, evaluate, draw and save.

    Raises:
        ValueError: for a data set without labels.
    """
    output_dir = own_folder(config.output_dir, teacher=config.teacher, dataset=config.dataset)
    if (output_dir / "config.json").exists() and not _is_demo(output_dir):
        raise ValueError(
            f"--output_dir: expected a new folder or an earlier demo's, got {output_dir}, another model's"
        )
    teacher = load_teacher(config.teacher)
    train_images, test_images, labels, class_names = _load(config)
    layers = demo_layers(teacher)
    architecture = demo_architecture(teacher.feature_size, num_levels=len(layers), level_size=teacher.hidden_size)
    inherit(architecture, [teacher], dataset=config.dataset)
    image_processor = matching_image_processor(teacher, architecture.image_size)

    cache = TargetCache.build(
        train_images, teacher, image_processor, layers=layers, dtype=torch.float16, description="teacher"
    )
    student = _distil(architecture, cache, image_processor, config, output_dir)
    with tempfile.TemporaryDirectory() as scratch:
        control = _distil(architecture, cache.shuffled(config.seed), image_processor, config, Path(scratch))
    torch.manual_seed(config.seed)
    models = {DISTILLED: student, RANDOM: APMModel(architecture).eval(), SHUFFLED: control}
    models = {name: model.to(teacher.device) for name, model in models.items()}

    test = _Test(teacher, image_processor, teacher.encode_text(class_names).cpu(), labels, config.seed)
    for index, condition in enumerate(CONDITIONS):
        images = [_corrupted(image, condition, number, config.seed) for number, image in enumerate(test_images)]
        test.run(condition, images, models, shown=index % len(images))

    facts = _facts(config, student, test.rows)
    scene = SceneDataset(1, seed=config.seed + 424_243)[0]["image"]  # a stream of its own
    write_card_picture(output_dir, APM(student, image_processor, teacher), [scene])
    facts = replace(facts, photos="a drawn scene that it was not trained on")
    report_dir = Path(config.report_dir or f"{config.output_dir.rstrip('/')}_report")
    table, files = write_report(report_dir, test.rows, test.panels, test.losses, facts)
    write_card(
        output_dir, replace(facts, comparison=f"Compared with its teacher and controls (top-1 in percent):\n\n{table}")
    )
    if config.teacher == DEMO_TEACHER and config.dataset is None:
        files += photo_page(report_dir, seed=config.seed)
    return DemoResult(test.rows, table, files, output_dir)


def photo_page(folder: Path, *, seed: int = 0) -> list[Path]:
    """Write a page of what the pair of photos in the package outputs for sample photos; return its files.

    Raises:
        ImportError: without the extra `viz`, with which the photos come.
    """
    apm, photos = APM.load(PHOTO_MODEL, teacher=PHOTO_TEACHER), sample_photos()
    teacher, images = apm.teacher, list(photos.values())
    assert teacher is not None
    names = [*apm.default_labels, *OTHER_WORDS]
    outputs = teacher.encode_images(images)
    assert outputs.image_embeds is not None and outputs.features is not None
    pixel_values, tokens = apm.pixel_values(images), apm.trigger_column(images)
    assert tokens is not None
    models = {"dense student": apm.bare_model, RANDOM: apm.control(seed=seed).bare_model}
    panels = [
        ImagePanels.from_models(
            name,
            photo,
            pixel_values[row : row + 1],
            outputs.features[row : row + 1],
            models,
            {},
            index=row,
            trigger_column=tokens[row : row + 1],
        )
        for row, (name, photo) in enumerate(photos.items())
    ]
    logits = classify(outputs.image_embeds, teacher.encode_text(names), logit_scale=teacher.logit_scale)
    words = {
        name: {one.label: one.score for one in found}
        for name, found in zip(photos, topk(logits, names, 3), strict=True)
    }
    notes = f"among the names of the {len(apm.default_labels)} classes that it learnt and {', '.join(OTHER_WORDS)}"
    return write_photo_page(folder, panels, words, notes)


def demo_layers(teacher: Teacher) -> list[int]:
    """Return three of the teacher's layers, low to high: parts to wholes."""
    return sorted({max(1, round(share * teacher.num_layers)) for share in (0.2, 0.6, 1.0)})


def demo_architecture(feature_size: int, **overrides: Any) -> APMConfig:
    """Return the `tiny` preset with more capacity to distinguish images and locations.

    It pools by attention, since the mean of the features cannot match the teacher's image embedding while the features
    match the teacher's patches; with mean pooling, L_grid and L_cls conflict.
    """
    fields = {
        "feature_size": feature_size,
        "trigger_channels": 4,
        "local_patch": True,
        "local_patch_scales": [1, 2],
        "pooling": "attention",
    }
    return APMConfig.preset("tiny", **{**fields, **overrides})


class _Test:
    """Evaluate every model, one condition at a time."""

    def __init__(self, teacher: Teacher, image_processor: Any, text_embeds: Tensor, labels: Tensor, seed: int) -> None:
        self.teacher, self.image_processor = teacher, image_processor
        self.text_embeds, self.labels, self.seed = text_embeds, labels, seed
        self.rows: dict[str, dict[str, float]] = {}
        self.panels: list[ImagePanels] = []
        self.losses: dict[str, list[Tensor]] = {}

    def run(self, condition: str, images: Sequence[Any], models: dict[str, APMModel], *, shown: int) -> None:
        cache = TargetCache.build(images, self.teacher, self.image_processor, description=f"test, {condition}")
        features = cache.features.flatten(1, 2)  # (B, rows, cols, F) -> (B, L, F)
        coordinates = grid_coordinates(*cache.features.shape[1:3], device=self.teacher.device)
        pixel_values = cache.pixel_values.to(self.teacher.device)
        self._record(TEACHER, condition, cache.image_embeds)
        for name, model in models.items():
            with torch.no_grad():
                outputs = model(pixel_values, coordinates)
            self._record(name, condition, outputs.pooler_output, outputs.last_hidden_state, features)
        adapted = {}
        for name, start in ((ADAPTED, "model"), (FROM_SCRATCH, "random")):
            recipe = TTTConfig.preset("fast", start=start, seed=self.seed)
            adapted[name] = adapt(models[DISTILLED], pixel_values, cache.image_embeds, config=recipe)
            model_features = adapted[name].query(coordinates).last_hidden_state
            self._record(name, condition, adapted[name].image_embeds, model_features, features)
            self.losses.setdefault(name, []).append(adapted[name].losses)
        one = slice(shown, shown + 1)
        self.panels.append(
            ImagePanels.from_models(
                condition, images[shown], pixel_values[one], cache.features[one], models, adapted, index=shown
            )
        )

    def _record(
        self,
        method: str,
        condition: str,
        embeds: Tensor | None,
        model_features: Tensor | None = None,
        features: Tensor | None = None,
    ) -> None:
        assert embeds is not None
        row = self.rows.setdefault(method, {})
        predicted = classify(embeds.cpu(), self.text_embeds).argmax(dim=-1)
        row[f"top-1, {condition}"] = (predicted == self.labels).float().mean().item()
        if model_features is not None and features is not None:
            row[f"cosine, {condition}"] = F.cosine_similarity(model_features.cpu(), features, dim=-1).mean().item()


def _load(config: DemoConfig) -> tuple[list[Any], list[Any], Tensor, list[str]]:
    """Return training images, test images, the latter's labels `(B,)`, and class names."""
    if config.dataset is None:
        train = SceneDataset(config.num_images, seed=config.seed)
        test = SceneDataset(config.num_test_images, seed=config.seed + TEST_SEED)
        test_rows = [test[i] for i in range(len(test))]
        labels = torch.tensor([row["label"] for row in test_rows])
        return (
            [train[i]["image"] for i in range(len(train))],
            [row["image"] for row in test_rows],
            labels,
            [*CLASS_NAMES],
        )
    from ..data.images import decode_image
    from ..data.loading import train_and_validation

    train_data, test_data = train_and_validation(
        config.dataset,
        max_images=config.num_images,
        max_validation_images=config.num_test_images,
        seed=config.seed,
        validation_fraction=0.2,
    )
    label_column = test_data.require_labels()
    if test_data.class_names is None:
        raise ValueError(f"--dataset: expected class names for the column {label_column!r}, found none")
    images = [[decode_image(row[data.image_column]) for row in data.dataset] for data in (train_data, test_data)]
    return images[0], images[1], torch.tensor(list(test_data.dataset[label_column])), test_data.class_names


def _distil(
    architecture: APMConfig, cache: TargetCache, image_processor: Any, config: DemoConfig, output_dir: Path
) -> APMModel:
    torch.manual_seed(config.seed)
    settings = DistillationConfig(
        output_dir=str(output_dir),
        max_steps=config.max_steps,
        learning_rate=4e-3,
        # With fewer steps, some seeds end with a student that outputs the same for every image.
        warmup_steps=max(32, config.max_steps // 20),
        num_locations=48,
        checkpoint_steps=0,
        report_to="none",
        overwrite=True,
        seed=config.seed,
    )
    return distill(APMModel(architecture), cache, config=settings, image_processor=image_processor).student


def _is_demo(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and COMMAND in card.read_text(encoding="utf-8", errors="replace")


def _corrupted(image: Any, condition: str, number: int, seed: int) -> Any:
    if condition == "clean":
        return image
    generator = np.random.default_rng([seed, number])
    return corrupt(image, condition, severity=SEVERITY, generator=generator)


def _facts(config: DemoConfig, student: APMModel, rows: dict[str, dict[str, float]]) -> CardFacts:
    command = f"{COMMAND} --max_steps {config.max_steps} --num_images {config.num_images} --seed {config.seed}"
    return CardFacts(
        repo_id=config.output_dir,
        teacher="apm_hf's demo teacher" if config.teacher == DEMO_TEACHER else config.teacher,
        dataset="apm_hf's drawn part-whole scenes" if config.dataset is None else config.dataset,
        command=command,
        steps=config.max_steps,
        num_parameters=student.num_parameters(),
        metrics=rows[DISTILLED],
    )
