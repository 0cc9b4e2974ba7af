"""The models of docs/islands_measured.md: distilled from drawn scenes, or from photos, with a column of levels.

    python benchmarks/islands.py --output_dir runs/islands/scenes --seed 0
    python benchmarks/islands.py --output_dir runs/islands/photos --teacher FOLDER --dataset FOLDER --preset photos

They are scored by `apm evaluate --task islands --model FOLDER`, which has the controls. Teachers are asked once about
every view of every image, before the training, and all is kept in memory (a photo's view takes a mebibyte); for more,
`apm distill --random_crops --jitter` asks at each step instead.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from apm_hf import APMConfig, APMModel, load_teacher
from apm_hf.assets import DEMO_TEACHER
from apm_hf.data.augmentation import RandomCrops
from apm_hf.data.images import eight_bit_rgb
from apm_hf.data.loading import load_images
from apm_hf.data.scenes import SceneDataset
from apm_hf.distillation import DistillationConfig, distill, matching_image_processor
from apm_hf.teachers import Teacher
from apm_hf.teachers.targets import TargetCache

PRESETS: dict[str, dict[str, Any]] = {
    "scenes": {
        "architecture": {"local_patch_scales": [1, 2], "trigger_channels": 4},
        "layers": [1, 3, 5],
        "training": {"learning_rate": 4e-3, "num_locations": 48, "max_steps": 640},
        "factor": 2,
    },
    "photos": {
        "architecture": {
            "image_size": 224, "patch_size": 16, "position_size": 128, "local_patch_scales": [1, 2, 4],
            "trigger_channels": 2, "hidden_sizes": [768, 512, 384], "initializer_range": 0.04,
        },
        "layers": [2, 6, 9, 11],
        "training": {"learning_rate": 1e-3, "num_locations": 32, "max_steps": 1500, "batch_size": 48},
        "factor": 1,
    },
}  # fmt: skip


class Views:
    """Every image of a data set, `count` times, each time another random part of it."""

    def __init__(self, dataset: str, count: int, seed: int, max_images: int | None):
        data = load_images(dataset, max_images=max_images)
        self.crops = RandomCrops(data.dataset, data.image_column, seed=seed)
        self.column, self.count = data.image_column, count

    def __len__(self) -> int:
        return len(self.crops) * self.count

    def __getitem__(self, index: int) -> Image.Image:
        self.crops.set_epoch(index // len(self.crops))
        return eight_bit_rgb(self.crops[index % len(self.crops)][self.column])


class Scenes:
    def __init__(self, count: int, seed: int):
        self.scenes = SceneDataset(count, seed=seed)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Image.Image:
        return self.scenes[index]["image"]


def architecture(preset: str, teacher: Teacher) -> APMConfig:
    """A model as wide as its teacher, with local patches, attention pooling and a level per layer."""
    settings = PRESETS[preset]
    fields = {
        "feature_size": teacher.feature_size,
        "num_levels": len(settings["layers"]),
        "level_size": teacher.hidden_size,
        "local_patch": True,
        "pooling": "attention",
    }
    return APMConfig.preset("tiny", **{**fields, **settings["architecture"]})


def run(options: argparse.Namespace) -> None:
    settings = PRESETS[options.preset]
    teacher = load_teacher(options.teacher, dtype=options.teacher_dtype)
    config = architecture(options.preset, teacher)
    image_processor = matching_image_processor(teacher, config.image_size)
    images: Any = Scenes(options.num_images, options.seed)
    if options.dataset is not None:
        images = Views(options.dataset, options.views, options.seed, options.num_images)
    cache = TargetCache.build(
        images, teacher, image_processor, factor=settings["factor"], layers=settings["layers"], dtype=torch.float16,
        description="teacher",
    )  # fmt: skip
    training = {**settings["training"], **({"max_steps": options.max_steps} if options.max_steps else {})}
    torch.manual_seed(options.seed)
    distill(
        APMModel(config),
        cache,
        config=DistillationConfig(
            output_dir=str(options.output_dir), seed=options.seed, level_layers=settings["layers"],
            warmup_steps=training["max_steps"] // 20, checkpoint_steps=0, report_to="none", **training,
        ),
        image_processor=image_processor,
    )  # fmt: skip


def main() -> None:
    logging.basicConfig(format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="scenes")
    parser.add_argument("--teacher", default=DEMO_TEACHER)
    parser.add_argument("--teacher_dtype", help="bfloat16 is faster on many computers")
    parser.add_argument("--dataset", help="by default drawn scenes")
    parser.add_argument("--num_images", type=int, default=2048)
    parser.add_argument("--views", type=int, default=3, help="random parts of each image of --dataset")
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
