"""Two teachers, one student: with and without the statistics of their features, and beside students of one of them.

    python benchmarks/several_teachers.py --max_steps 20 --num_images 32
    python benchmarks/several_teachers.py --second ../shared/teachers/deit-tiny --scale 30

Both teachers' answers to drawn scenes are asked for once; all students see the same images in the same order. Figures
are of scenes held out: the cosine to the teacher's patches and to its image embedding, and R² of the patches, which
the mean feature alone does not raise. `--scale` multiplies the second teacher's answers, as some teachers' are larger
than others' by that much; cosines and R² do not change by it.
"""

import argparse
import copy
import logging
import tempfile

import torch
from torch import Tensor
from torch.utils.data import Dataset

from apm_hf import APMModel, load_teacher
from apm_hf.assets import DEMO_TEACHER
from apm_hf.data.scenes import SceneDataset
from apm_hf.demo.story import demo_architecture
from apm_hf.distillation import DistillationConfig, distill, matching_image_processor
from apm_hf.distillation.feature_statistics import RunningStatistics
from apm_hf.teachers import Teacher
from apm_hf.teachers.matching import same_view

FIGURES = ("feature_cosine", "feature_r2", "embed_cosine")
BATCH = 32
ARCHITECTURE = {"hidden_act": "gelu", "initializer_range": 0.05}  # leaves the mean in fewer steps than ReLU


class Answers(Dataset):
    """Images with both teachers' answers."""

    def __init__(self, columns: dict[str, Tensor]):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["pixel_values"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.columns.items()}

    def of(self, teacher: str) -> "Answers":
        """With the answers of one of them alone, as the main one."""
        suffix = {"first": "", "second": ".second"}[teacher]
        names = ("image_embeds", "features")
        columns = {name: self.columns[name + suffix] for name in names}
        return Answers({"pixel_values": self.columns["pixel_values"], **columns})


def ask_teachers(scenes: SceneDataset, first: Teacher, second: Teacher, image_processor, scale: float) -> Answers:
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(scenes), BATCH):
        images = [scenes[index]["image"] for index in range(start, min(start + BATCH, len(scenes)))]
        seen = {"": first.image_processor, ".second": same_view(second, first)}
        parts.setdefault("pixel_values", []).append(image_processor(images, return_tensors="pt")["pixel_values"])
        for (suffix, processor), teacher in zip(seen.items(), (first, second), strict=True):
            answer = teacher.encode_images(pixel_values=processor(images, return_tensors="pt")["pixel_values"])
            for name in ("image_embeds", "features"):
                parts.setdefault(name + suffix, []).append(answer[name].cpu() * (scale if suffix else 1))
    return Answers({name: torch.cat(values) for name, values in parts.items()})


def train(architecture, data: Answers, held_out: Answers, image_processor, options, statistics: str | None):
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            max_steps=options.max_steps,
            batch_size=16,
            learning_rate=2e-3,
            warmup_steps=options.max_steps // 10,
            num_locations=24,
            statistics_images=0 if statistics is None else len(data),
            statistics=statistics or "channel",
            validation_steps=options.max_steps,
            checkpoint_steps=0,
            num_pictures=0,
            report_to="none",
            seed=options.seed,
        )
        model = APMModel(copy.deepcopy(architecture))  # statistics are written into it
        result = distill(model, data, config=config, image_processor=image_processor, validation_data=held_out)
    return result.metrics[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", default=DEMO_TEACHER)
    parser.add_argument("--second", default=DEMO_TEACHER, help="name or folder of the other teacher")
    parser.add_argument("--scale", type=float, default=1.0, help="what the other teacher's answers are multiplied by")
    parser.add_argument("--num_images", type=int, default=256)
    parser.add_argument("--max_steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("apm_hf").setLevel(logging.WARNING)
    first, second = load_teacher(options.first), load_teacher(options.second)
    image_processor = matching_image_processor(first, 96)
    data, held_out = (
        ask_teachers(SceneDataset(number, seed=seed), first, second, image_processor, options.scale)
        for number, seed in ((options.num_images, 0), (64, 1_000_000))
    )
    for name, suffix, teacher in (("first", "", first), ("second", ".second", second)):
        measured = RunningStatistics(teacher.feature_size)
        measured.add(data.columns["features" + suffix])
        (mean, std), common = measured.result(), measured.result("scalar")[1]
        grid = tuple(data.columns["features" + suffix].shape[1:3])
        print(
            f"{name} teacher: {teacher.feature_size} wide, grid {grid}, root mean square of the channels' means "
            f"{mean.square().mean().sqrt():.3g}, standard deviation {common:.3g}, of channels {std.min():.3g} to "
            f"{std.max():.3g}"
        )
    rows = {}
    heads = {"second": {"feature_size": second.feature_size}}
    both = demo_architecture(first.feature_size, teacher_heads=heads, **ARCHITECTURE)
    for label, statistics in (("none", None), ("per channel", "channel"), ("one deviation", "scalar")):
        found = train(both, data, held_out, image_processor, options, statistics)
        rows[f"both, {label}"] = [found[prefix + figure] for prefix in ("", "second/") for figure in FIGURES]
    alone = []
    for name, teacher in (("first", first), ("second", second)):
        single = demo_architecture(teacher.feature_size, **ARCHITECTURE)
        found = train(single, data.of(name), held_out.of(name), image_processor, options, "channel")
        alone += [found[figure] for figure in FIGURES]
    rows["a student each, per channel"] = alone
    print("| teachers, statistics | " + " | ".join(f"{t}: {f}" for t in ("first", "second") for f in FIGURES) + " |")
    print("| --- |" + " ---: |" * 6)
    for label, values in rows.items():
        print(f"| {label} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


if __name__ == "__main__":
    main()
