"""Adapt to every image of a data set and compare the adapted APM with its teacher, image by image.

    python examples/test_time_training.py --teacher TEACHER --dataset FOLDER --max_images 4 --steps 2
    torchrun --nproc_per_node 8 examples/test_time_training.py --teacher openai/clip-vit-large-patch14 \\
        --dataset ILSVRC/imagenet-1k --split validation --max_images 50000 --batch_size 64 --output_file results.jsonl

Prints how often the two agree, both accuracies, the cosine between their embeddings and the time per image. A model
that is fitted to the end repeats its teacher (arXiv:2410.20535, section 4): agreement says how far the fit got. An
image's line in the file depends neither on the batch size nor on the number of processes (on the CPU, to the bit).
"""

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import HfArgumentParser

from apm_hf import APM, TTTConfig
from apm_hf.data.images import decode_image
from apm_hf.data.loading import load_images
from apm_hf.runs.processes import process_state


@dataclass(frozen=True, kw_only=True)
class ScriptConfig:
    """Which teacher, which images, which recipe."""

    teacher: str = field(metadata={"help": "name or folder of the teacher"})
    dataset: str = field(metadata={"help": "a labelled Hub dataset, a folder or a parquet file"})
    split: str | None = field(default=None, metadata={"help": "by default the only one, or train"})
    model: str | None = field(default=None, metadata={"help": "APM to start from; by default a fresh clip-ttt"})
    preset: str = field(default="fast", metadata={"help": "recipe: paper, reference or fast"})
    fit: str | None = field(default=None, metadata={"help": "what learns, instead of the recipe's; see TTTConfig"})
    steps: int | None = field(default=None, metadata={"help": "instead of the recipe's"})
    learning_rate: float | None = field(default=None, metadata={"help": "instead of the recipe's"})
    num_locations: int | None = field(default=None, metadata={"help": "instead of the recipe's"})
    dtype: str | None = field(default=None, metadata={"help": "float32 or bfloat16, instead of the recipe's"})
    stop: str | None = field(default=None, metadata={"help": "plateau, cosine or stable; by default never"})
    stop_threshold: float | None = field(default=None, metadata={"help": "of plateau and cosine"})
    stop_patience: int | None = field(default=None, metadata={"help": "steps"})
    max_images: int = field(default=200, metadata={"help": "adapt to so many images, drawn with the seed"})
    batch_size: int = field(default=16, metadata={"help": "images adapted to at once, in every process"})
    seed: int = 0
    output_file: str | None = field(default=None, metadata={"help": "one JSON line an image"})


RECIPE = ("fit", "steps", "learning_rate", "num_locations", "dtype", "stop", "stop_threshold", "stop_patience")


def run(config: ScriptConfig) -> dict[str, float]:
    state = process_state()
    apm = APM.load(config.model, teacher=config.teacher)
    data = load_images(config.dataset, split=config.split, max_images=config.max_images, seed=config.seed)
    label_column = data.require_labels()
    if data.class_names is None:
        raise ValueError(f"--dataset: expected class names for the column {label_column!r}, found none")
    recipe = {name: value for name in RECIPE if (value := getattr(config, name)) is not None}
    if config.model is not None:
        recipe["start"] = "model"
    ttt = TTTConfig.preset(config.preset, seed=config.seed, **recipe)
    classifier = apm.classifier(data.class_names, config=ttt)
    mine = range(state.process_index, len(data.dataset), state.num_processes)
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    batches = range(0, len(mine), config.batch_size)
    for start in (progress := tqdm(batches, desc="adapt", disable=not state.is_main_process)):
        indices = list(mine[start : start + config.batch_size])
        batch = data.dataset[indices]
        result = classifier([decode_image(image) for image in batch[data.image_column]])
        teacher_classes, classes = (
            logits.argmax(dim=-1).tolist() for logits in (result.teacher_logits, result.logits)
        )
        for position, index in enumerate(indices):
            rows.append(
                {
                    "image": index,
                    "label": batch[label_column][position],
                    "teacher": teacher_classes[position],
                    "adapted": classes[position],
                    "agrees": result.agreement[position].item(),
                    "cosine": result.target_cosine[position].item(),
                    "steps": int(result.adapted.steps[position]),
                }
            )
        progress.set_postfix(agreement=f"{sum(row['agrees'] for row in rows) / len(rows):.3f}")
    seconds = time.perf_counter() - started
    rows = sorted(gather_object(rows), key=lambda row: row["image"])
    if config.output_file is not None and state.is_main_process:
        partial = Path(config.output_file).with_suffix(".part")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(config.output_file)

    def mean(values) -> float:
        return torch.tensor(list(values), dtype=torch.float64).mean().item()

    return {
        "images": len(rows),
        "processes": state.num_processes,
        "steps": mean(row["steps"] for row in rows),
        "agreement with the teacher": mean(row["agrees"] for row in rows),
        "teacher top-1": mean(row["teacher"] == row["label"] for row in rows),
        "adapted APM top-1": mean(row["adapted"] == row["label"] for row in rows),
        "cosine to the teacher": mean(row["cosine"] for row in rows),
        "seconds per image": seconds / len(rows),
    }


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("apm_hf").setLevel(logging.INFO)
    (config,) = HfArgumentParser(ScriptConfig).parse_args_into_dataclasses()
    figures = run(config)
    if process_state().is_main_process:
        for name, value in figures.items():
            print(f"{name:<28} {value:.4f}" if isinstance(value, float) else f"{name:<28} {value}")


if __name__ == "__main__":
    main()
