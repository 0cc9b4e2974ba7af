"""Adapt to every image of a data set and compare the adapted APM with its teacher, image by image.

    python examples/test_time_training.py --teacher TEACHER --dataset FOLDER --max_images 4 --steps 2
    python examples/test_time_training.py --teacher openai/clip-vit-large-patch14 --dataset ILSVRC/imagenet-1k

Prints how often the two agree, both accuracies, the cosine between their embeddings and the time per image. A machine
that is fitted to the end repeats its teacher (arXiv:2410.20535, section 4): agreement says how far the fit got.
"""

import logging
import time
from dataclasses import dataclass, field

import torch
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, HfArgumentParser

from apm_hf import TTTConfig, load_teacher
from apm_hf.data.images import decode_image
from apm_hf.data.loading import load_images
from apm_hf.ttt_classification import TTTClassifier


@dataclass(frozen=True, kw_only=True)
class ScriptConfig:
    """Which teacher, which images, which recipe."""

    teacher: str = field(metadata={"help": "name or folder of the teacher"})
    dataset: str = field(metadata={"help": "a labelled Hub dataset, a folder or a parquet file"})
    split: str | None = field(default=None, metadata={"help": "by default the only one, or train"})
    model: str | None = field(default=None, metadata={"help": "APM to start from; by default a fresh clip-ttt"})
    preset: str = field(default="fast", metadata={"help": "recipe: paper, reference or fast"})
    steps: int | None = field(default=None, metadata={"help": "instead of the recipe's"})
    learning_rate: float | None = field(default=None, metadata={"help": "instead of the recipe's"})
    num_locations: int | None = field(default=None, metadata={"help": "instead of the recipe's"})
    max_images: int = field(default=200, metadata={"help": "adapt to so many images, drawn with the seed"})
    batch_size: int = field(default=4, metadata={"help": "images adapted to at once"})
    seed: int = 0


def run(config: ScriptConfig) -> dict[str, float]:
    teacher = load_teacher(config.teacher)
    data = load_images(config.dataset, split=config.split, max_images=config.max_images, seed=config.seed)
    label_column = data.require_labels()
    if data.class_names is None:
        raise ValueError(f"--dataset: expected class names for the column {label_column!r}, found none")
    given = {name: getattr(config, name) for name in ("steps", "learning_rate", "num_locations")}
    recipe = {name: value for name, value in given.items() if value is not None}
    model = image_processor = None
    if config.model is not None:
        model = AutoModel.from_pretrained(config.model).to(teacher.device)
        image_processor = AutoImageProcessor.from_pretrained(config.model)
        recipe["start"] = "model"
    classifier = TTTClassifier(
        teacher,
        data.class_names,
        config=TTTConfig.preset(config.preset, seed=config.seed, **recipe),
        model=model,
        image_processor=image_processor,
    )
    agreed, cosines, teacher_right, right = [], [], [], []
    started = time.perf_counter()
    for start in (progress := tqdm(range(0, len(data.dataset), config.batch_size), desc="adapt")):
        rows = data.dataset[start : start + config.batch_size]
        labels = torch.tensor(rows[label_column])
        result = classifier([decode_image(image) for image in rows[data.image_column]])
        agreed.append(result.agreement)
        cosines.append(result.target_cosine)
        teacher_right.append(result.teacher_logits.argmax(dim=-1) == labels)
        right.append(result.logits.argmax(dim=-1) == labels)
        progress.set_postfix(agreement=f"{torch.cat(agreed).float().mean():.3f}")
    return {
        "images": len(data.dataset),
        "steps": classifier.config.steps,
        "agreement with the teacher": torch.cat(agreed).float().mean().item(),
        "teacher top-1": torch.cat(teacher_right).float().mean().item(),
        "adapted APM top-1": torch.cat(right).float().mean().item(),
        "cosine to the teacher": torch.cat(cosines).mean().item(),
        "seconds per image": (time.perf_counter() - started) / len(data.dataset),
    }


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("apm_hf").setLevel(logging.INFO)
    (config,) = HfArgumentParser(ScriptConfig).parse_args_into_dataclasses()
    for name, value in run(config).items():
        print(f"{name:<28} {value:.4f}" if isinstance(value, float) else f"{name:<28} {value}")


if __name__ == "__main__":
    main()
