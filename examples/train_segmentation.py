"""Fit a linear probe to a distilled APM's features and save both as a semantic segmentation model.

    python examples/train_segmentation.py --output_dir runs/parts --max_images 24 --max_validation_images 8
    python examples/train_segmentation.py --model runs/coco --dataset EduardoPacheco/FoodSeg103 --mask_column label \\
        --max_images 4983 --max_validation_images 2135 --map_size 256 --output_dir runs/food

The first takes what travels with the package: its APM and drawn scenes. A data set has a column of masks, whose pixels
are class indices, and 255 where there is none. The APM is frozen. It is queried at sampled pixels of the training
masks and at every pixel of held-out ones, and so is one with random weights, the control. The result runs as
`pipeline("image-segmentation", OUTPUT_DIR)`; it reads the whole picture, squeezed into its square.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from apm_hf import APM, APMForSemanticSegmentation
from apm_hf.assets import DEMO_MODEL
from apm_hf.data.images import decode_image
from apm_hf.data.loading import train_and_validation
from apm_hf.data.scenes import PART_NAMES, SceneDataset
from apm_hf.evaluation.masks.probes import LinearProbe, MeanIoU, sample_locations, segmentation_model
from apm_hf.islands.scores import resize_labels
from apm_hf.modeling_apm import IGNORE_INDEX
from apm_hf.position_encoding import grid_coordinates
from apm_hf.runs.files import write_atomically
from apm_hf.runs.processes import process_state

SCENE_SEEDS = 2, 3  # the embedded models have learnt from scenes of the seeds 0 and 1


@dataclass(frozen=True, kw_only=True)
class ScriptConfig:
    """Configure which APM is used, on which images and how many of their pixels."""

    output_dir: str = field(metadata={"help": "folder of the segmentation model, and of metrics.json"})
    model: str = field(default=DEMO_MODEL, metadata={"help": "folder or name of a distilled APM"})
    dataset: str | None = field(default=None, metadata={"help": "Hub name, folder or parquet; by default scenes"})
    split: str | None = field(default=None, metadata={"help": "training split"})
    validation_split: str | None = field(default=None, metadata={"help": "by default found, or held out"})
    validation_fraction: float = field(default=0.25, metadata={"help": "held out where there is no such split"})
    image_column: str = "image"
    mask_column: str = "part_mask"
    class_names: str | None = field(default=None, metadata={"help": "JSON file, the list of the classes' names"})
    ignore_index: int = field(default=IGNORE_INDEX, metadata={"help": "value of mask pixels without class"})
    map_size: int | None = field(default=None, metadata={"help": "long side of the masks; by default their own"})
    num_locations: int = field(default=256, metadata={"help": "training pixels of each image"})
    balanced: bool = field(default=False, metadata={"help": "sample as many pixels of each class of an image"})
    regularisation: float = field(default=1e-3, metadata={"help": "L2 penalty of the logistic regression"})
    max_iter: int = field(default=1000, metadata={"help": "iterations of the logistic regression"})
    max_images: int = field(default=256, metadata={"help": "use at most this many images for training"})
    max_validation_images: int = field(default=64, metadata={"help": "use at most this many images for validation"})
    seed: int = 0


def load_rows(config: ScriptConfig) -> tuple[Any, Any]:
    """Load training and held-out rows."""
    if config.dataset is None:
        train_seed, validation_seed = SCENE_SEEDS
        validation = SceneDataset(config.max_validation_images, seed=validation_seed)
        return SceneDataset(config.max_images, seed=train_seed), validation
    train, validation = train_and_validation(
        config.dataset,
        split=config.split,
        validation_split=config.validation_split,
        validation_fraction=config.validation_fraction,
        image_column=config.image_column,
        max_images=config.max_images,
        max_validation_images=config.max_validation_images,
        seed=config.seed,
    )
    return train.dataset, validation.dataset


def read_mask(row: dict[str, Any], config: ScriptConfig) -> np.ndarray:
    """Return a mask `(rows, cols)` of class indices, 255 where there is none, at `map_size`."""
    if config.mask_column not in row:
        raise ValueError(f"--mask_column: expected one of {list(row)}, got {config.mask_column!r}")
    value = row[config.mask_column]
    mask = value if isinstance(value, np.ndarray) else np.asarray(decode_image(value))
    if mask.ndim != 2:
        raise ValueError(f"--mask_column: expected masks of one channel, got shape {mask.shape}")
    mask = np.where(mask == config.ignore_index, IGNORE_INDEX, mask.astype(np.int64))
    if config.map_size is None:
        return mask
    rows, cols = (max(1, round(side * config.map_size / max(mask.shape))) for side in mask.shape)
    return resize_labels(mask, (rows, cols))


def read(rows: Iterable[dict[str, Any]], config: ScriptConfig, what: str) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """Yield images and masks."""
    for row in tqdm(rows, desc=what):
        yield decode_image(row[config.image_column]), read_mask(row, config)


def class_names(config: ScriptConfig, *datasets: Iterable[dict[str, Any]]) -> list[str]:
    """Return class names: from the file, those of the scenes, or a number for each up to the largest in a mask."""
    if config.class_names is not None:
        return json.loads(Path(config.class_names).read_text())
    if config.dataset is None:
        return list(PART_NAMES) if config.mask_column == "part_mask" else ["background", "object"]
    masks = (mask for rows in datasets for _, mask in read(rows, config, "classes"))
    num_classes = 1 + max(int(mask[mask != IGNORE_INDEX].max(initial=0)) for mask in masks)
    return [f"class {index}" for index in range(num_classes)]


def fit(apm: APM, rows: Any, names: list[str], config: ScriptConfig) -> APMForSemanticSegmentation:
    """Fit a probe to an APM's features of sampled pixels, and join both."""
    generator = torch.Generator().manual_seed(config.seed)
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for image, mask in read(rows, config, "train"):
        picked = sample_locations(mask, config.num_locations, generator, balanced=config.balanced)
        if len(picked):
            features.append(apm.encode_dense(image, coordinates=grid_coordinates(*mask.shape)[picked])[0])  # (L, F)
            labels.append(torch.from_numpy(mask).flatten()[picked])
    probe = LinearProbe.fit(
        torch.cat(features),
        torch.cat(labels),
        num_classes=len(names),
        regularisation=config.regularisation,
        seed=config.seed,
        max_iter=config.max_iter,
    )
    return segmentation_model(apm.bare_model, probe, dict(enumerate(names)))


@torch.no_grad()
def evaluate(model: APMForSemanticSegmentation, image_processor: Any, rows: Any, config: ScriptConfig) -> MeanIoU:
    """Query the model at every pixel of every mask."""
    score = MeanIoU(model.num_labels)
    for image, mask in read(rows, config, "evaluate"):
        pixel_values = image_processor(image, return_tensors="pt")["pixel_values"].to(model.device)
        score.update(model(pixel_values, output_size=mask.shape).logits[0].argmax(dim=0).cpu(), mask)
    return score


def run(config: ScriptConfig) -> dict[str, dict[str, float]]:
    apm = APM.load(config.model, device=process_state().device)
    side = {"height": apm.bare_model.config.image_size, "width": apm.bare_model.config.image_size}
    image_processor = AutoImageProcessor.from_pretrained(config.model, do_center_crop=False, do_resize=True, size=side)
    train, validation = load_rows(config)
    names = class_names(config, train, validation)
    figures = {}
    for name, candidate in (("APM", apm), ("control: random weights", apm.control(seed=config.seed))):
        model = fit(candidate, train, names, config)
        score = evaluate(model, image_processor, validation, config)
        figures[name] = {"mean_iou": score.mean_iou, "pixel_accuracy": score.pixel_accuracy}
        if candidate is apm:
            model.save_pretrained(config.output_dir)
            image_processor.save_pretrained(config.output_dir)
    write_atomically(Path(config.output_dir) / "metrics.json", json.dumps(figures, indent=2) + "\n")
    return figures


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("apm_hf").setLevel(logging.INFO)
    (config,) = HfArgumentParser(ScriptConfig).parse_args_into_dataclasses()
    for name, figures in run(config).items():
        print(f"{name:<28} mIoU {figures['mean_iou']:.4f}   pixel accuracy {figures['pixel_accuracy']:.4f}")


if __name__ == "__main__":
    main()
