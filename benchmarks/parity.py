"""What each habit of the authors' release does to the result, on real photos: docs/parity.md is made of its tables.

    python benchmarks/parity.py --teacher ../shared/teachers/deit-tiny-lit --dataset ../shared/data/imagenet_sample1k

Rows start from the paper's recipe and switch one habit on, or from the release's and switch one off. Models are
`clip-ttt`, as wide as the teacher, every weight fitted, the pooled feature taken over `--num_locations` random
locations a step (an unbiased estimate of the grid's, which takes too long for 1,200 steps on a CPU;
docs/test_time_training.md compares the two). [`fit_as_released`] is the release's algorithm, one image after the
other, on an ordinary model.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from apm_hf import APMConfig, APMModel, TTTConfig, adapt, load_teacher
from apm_hf.data.images import decode_image, eight_bit_rgb
from apm_hf.data.loading import load_images
from apm_hf.distillation import matching_image_processor
from apm_hf.position_encoding import grid_coordinates
from apm_hf.teachers import Teacher
from apm_hf.teachers.zero_shot import class_embeds, classify
from apm_hf.ttt import TTTTargets

Row = dict[str, Any]
TABLES = ("teacher", "student", "copies", "grid", "short", "long")
SHIFT = 5  # tokens of DINOv2 with registers that are no patches


@dataclass(frozen=True)
class Habits:
    """A recipe of the release's kind; the defaults are the paper's.

    Args:
        steps: per image.
        std: of weights drawn anew for every image.
        draw_biases: draw the biases too, else they are zero.
        accumulate: do not zero the gradients while an image is fitted.
        decay_every: multiply the learning rate by 0.1 after so many steps; None never.
        carry_over: hand Adam's moments and the schedule on from image to image.
        num_locations: pooled at each step.
    """

    steps: int = 20
    std: float = 0.02
    draw_biases: bool = False
    accumulate: bool = False
    decay_every: int | None = None
    carry_over: bool = False
    num_locations: int = 16


RELEASE = Habits(steps=1200, std=0.01, draw_biases=True, accumulate=True, decay_every=200, carry_over=True)


def fit_as_released(
    model: APMModel, pixels: Tensor, targets: Tensor, habits: Habits, *, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Fit a copy of the model to one image after the other, and yield its embeddings after 20 steps and at the end."""
    generator = torch.Generator().manual_seed(seed)
    size = model.config.grid_size
    grid = grid_coordinates(size, size, device=model.device)
    model = APMModel(model.config).to(model.device)
    weights = {
        name: torch.zeros(weight.shape)
        if name.endswith(".bias") and not habits.draw_biases
        else torch.empty(weight.shape).normal_(0, habits.std, generator=generator)
        for name, weight in model.named_parameters()
    }
    optimizer = scheduler = None
    for image, target in zip(pixels.split(1), targets.split(1), strict=True):
        model.load_state_dict(weights)
        if optimizer is None or not habits.carry_over:
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, habits.decay_every or 2**31, gamma=0.1)
        optimizer.zero_grad()
        embeds = []
        for _ in range(habits.steps + 1):
            if not habits.accumulate:
                optimizer.zero_grad()
            where = grid[torch.randperm(len(grid), generator=generator)[: habits.num_locations]]
            pooled = model.pooled_features(image.to(model.device), where)
            embeds.append(pooled.detach()[0].cpu())
            if len(embeds) <= habits.steps:
                F.mse_loss(pooled, target.to(model.device)).backward()
                optimizer.step()
                scheduler.step()
        yield embeds[min(20, habits.steps)], embeds[-1]


def short_recipes(num_locations: int) -> dict[str, Habits]:
    paper = Habits(num_locations=num_locations)
    return {
        "paper: 20 steps, N(0, 0.02), zero biases": paper,
        "+ N(0, 0.01), biases too": replace(paper, std=0.01, draw_biases=True),
        "+ N(0, 0.1): were 0.01 the variance": replace(paper, std=0.1, draw_biases=True),
        "+ gradients accumulate": replace(paper, accumulate=True),
        "+ Adam's state carried over": replace(paper, carry_over=True),
        "+ N(0, 0.01), accumulate and carry over": replace(RELEASE, steps=20, num_locations=num_locations),
    }


def long_recipes(steps: int, num_locations: int) -> dict[str, Habits]:
    paper = Habits(steps=steps, num_locations=num_locations)
    release = replace(RELEASE, steps=steps, num_locations=num_locations)
    return {
        "release": release,
        "release, nothing carried over": replace(release, carry_over=False),
        "release, gradients zeroed": replace(release, accumulate=False),
        "release, neither": replace(release, accumulate=False, carry_over=False),
        f"paper, {steps:,} steps": paper,
        "+ gradients accumulate": replace(paper, accumulate=True),
        "+ StepLR(200, x0.1), afresh for each photo": replace(paper, decay_every=200),
    }


def ttt_rows(
    model: APMModel, pixels: Tensor, targets: Tensor, texts: Tensor, recipes: dict[str, Habits]
) -> Iterator[Row]:
    wanted = classify(targets, texts).argmax(dim=-1)
    for name, habits in recipes.items():
        fits = tqdm(fit_as_released(model, pixels, targets, habits), desc=name, total=len(targets), leave=False)
        after_20, end = (torch.stack(embeds) for embeds in zip(*fits, strict=True))
        cosines = F.cosine_similarity(end, targets)
        yield {
            "recipe": name,
            "photos": len(targets),
            "cosine, step 20": f"{F.cosine_similarity(after_20, targets).mean():.4f}",
            "cosine, end": f"{cosines.mean():.4f}",
            "first photo": f"{cosines[0]:.4f}",
            "later photos": f"{cosines[1:].mean():.4f}",
            "agreement": f"{(classify(end, texts).argmax(dim=-1) == wanted).double().mean():.3f}",
        }


def copies(model: APMModel, pixels: Tensor, target: Tensor) -> Row:
    """How far three naive steps on 8 copies are from three on the image alone."""
    outputs = []
    for count in (1, 8):
        torch.manual_seed(0)
        student = APMModel(model.config).to(pixels.device)
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-4)
        for _ in range(3):
            pooled = student(pixels.expand(count, -1, -1, -1)).pooler_output
            optimizer.zero_grad()
            F.mse_loss(pooled, target.expand(count, -1)).backward()
            optimizer.step()
        with torch.no_grad():
            outputs.append(student(pixels).pooler_output[0])
    difference = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    return {
        "habit": "8 copies instead of 1, 3 steps",
        "relative difference of the pooled feature": f"{difference:.1e}",
    }


def channel_rows(
    teacher: Teacher, images: list[Any], labels: Tensor, texts: Tensor, batch_size: int = 32
) -> list[Row]:
    """The teacher's zero-shot accuracy where its input is not what it was trained on."""

    def encode(change: Any) -> Tensor:
        embeds = []
        for start in tqdm(range(0, len(images), batch_size), desc="teacher"):
            batch = images[start : start + batch_size]
            answer = teacher.encode_images(pixel_values=change(batch))
            embeds.append(answer.image_embeds.cpu())
        return torch.cat(embeds)

    def processed(batch: list[Any], **options: Any) -> Tensor:
        return teacher.image_processor(images=batch, return_tensors="pt", **options)["pixel_values"].float()

    inputs = {
        "as trained": processed,
        "BGR": lambda batch: processed(batch).flip(1),
        "raw 0..255, RGB": lambda batch: processed(batch, do_rescale=False, do_normalize=False),
        "raw 0..255, BGR": lambda batch: processed(batch, do_rescale=False, do_normalize=False).flip(1),
    }
    rows, expected = [], None
    for name, change in inputs.items():
        embeds = encode(change)
        expected = embeds if expected is None else expected
        classes = classify(embeds, texts).argmax(dim=-1)
        rows.append(
            {
                "teacher's input": name,
                "photos": len(images),
                "top-1": f"{100 * (classes == labels).double().mean():.1f}",
                "cosine to the embedding as trained": f"{F.cosine_similarity(embeds, expected).mean():.4f}",
            }
        )
    return rows


def student_rows(
    model: APMModel, pixels: Tensor, targets: Tensor, texts: Tensor, options: argparse.Namespace
) -> list[Row]:
    config = TTTConfig.preset("paper", num_locations=options.num_locations)
    wanted, rows = classify(targets, texts).argmax(dim=-1), []
    for name, values in {"RGB": pixels, "BGR": pixels.flip(1)}.items():
        embeds = adapt(model, values, targets, config=config, keep_models=False).image_embeds.cpu()
        rows.append(
            {
                "student's input": name,
                "photos": len(values),
                "cosine, step 20": f"{F.cosine_similarity(embeds, targets).mean():.4f}",
                "agreement": f"{(classify(embeds, texts).argmax(dim=-1) == wanted).double().mean():.3f}",
            }
        )
    return rows


def shifted_rows(model: APMModel, teacher: Teacher, images: list[Any], pixels: Tensor, steps: int) -> list[Row]:
    """Fits to the teacher's grid, shifted as the release's targets are, scored against the true grid."""
    answer = teacher.encode_images(images)
    grid, size = answer.features.cpu(), model.config.grid_size  # (B, rows, cols, F)
    tokens = grid.flatten(1, 2)  # (B, rows * cols, F)
    # The release's first tokens are the class token and registers: the pooled embedding stands for them here.
    front = answer.image_embeds.cpu()[:, None].expand(-1, SHIFT, -1)
    shifted = torch.cat([front, tokens[:, :-SHIFT]], dim=1).view_as(grid)

    def resized(values: Tensor) -> Tensor:
        answer = F.interpolate(values.movedim(-1, 1), (size, size), mode="bilinear", align_corners=False)
        return answer.flatten(2).mT  # (B, L, F)

    truth = resized(grid)
    mean = truth.mean(dim=1, keepdim=True)
    rows = []
    for name, wanted in {"the teacher's grid": grid, "shifted by five tokens": shifted}.items():
        config = TTTConfig(steps=steps, num_locations=128, learning_rate=3e-4)
        result = adapt(model, pixels, TTTTargets(features=wanted), config=config)
        answers = result.query().last_hidden_state.cpu()

        def cosine(left: Tensor, right: Tensor) -> str:
            return f"{F.cosine_similarity(left, right, dim=-1).mean():.4f}"

        rows.append(
            {
                "grid targets": name,
                "photos": len(pixels),
                "target's own cosine to the true grid": cosine(resized(wanted), truth),
                "fitted": cosine(answers, truth),
                "fitted, less the photo's mean": cosine(answers - mean, truth - mean),
            }
        )
    return rows


def print_table(title: str, rows: Iterable[Row]) -> list[Row]:
    """A line as soon as it is there: some take minutes."""
    printed: list[Row] = []
    for row in rows:
        if not printed:
            print(f"\n{title}\n\n| " + " | ".join(row) + " |\n| --- |" + " ---: |" * (len(row) - 1), flush=True)
        print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
        printed.append(row)
    return printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="with a text tower or class weights")
    parser.add_argument("--dataset", required=True, help="labelled photos")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="which (default: all)")
    parser.add_argument("--num_photos", type=int, default=32, help="for 20 steps (default: %(default)s)")
    parser.add_argument("--num_long", type=int, default=4, help="for the long recipes (default: %(default)s)")
    parser.add_argument("--long_steps", type=int, default=1200, help="the release's (default: %(default)s)")
    parser.add_argument("--num_locations", type=int, default=16, help="a step (default: %(default)s)")
    parser.add_argument("--num_teacher", type=int, default=1000, help="photos for the teacher's own rows")
    parser.add_argument("--num_grids", type=int, default=4, help="photos for grid targets")
    parser.add_argument("--grid_steps", type=int, default=200)
    parser.add_argument("--output_file", help="also write the tables as JSON")
    options = parser.parse_args()
    teacher = load_teacher(options.teacher)
    data = load_images(options.dataset, max_images=options.num_teacher, seed=0)
    rows = data.dataset[:]
    images = [eight_bit_rgb(decode_image(image)) for image in rows[data.image_column]]
    labels = torch.tensor(rows[data.require_labels()])
    texts = class_embeds(teacher, data.class_names).cpu()
    model = APMModel(APMConfig.preset("clip-ttt", feature_size=teacher.feature_size)).to(teacher.device)
    few = images[: max(options.num_photos, options.num_long, options.num_grids)]
    pixels = matching_image_processor(teacher, model.config.image_size)(few, return_tensors="pt")["pixel_values"]
    targets = teacher.encode_images(few).image_embeds.cpu()

    short, long = (slice(count) for count in (options.num_photos, options.num_long))
    makers: dict[str, Callable[[], Iterable[Row]]] = {
        "teacher": lambda: channel_rows(teacher, images, labels, texts),
        "student": lambda: student_rows(model, pixels[short], targets[short], texts, options),
        "copies": lambda: [copies(model, pixels[:1].to(teacher.device), targets[:1].to(teacher.device))],
        "grid": lambda: shifted_rows(
            model, teacher, few[: options.num_grids], pixels[: options.num_grids], options.grid_steps
        ),
        "short": lambda: ttt_rows(model, pixels[short], targets[short], texts, short_recipes(options.num_locations)),
        "long": lambda: ttt_rows(
            model, pixels[long], targets[long], texts, long_recipes(options.long_steps, options.num_locations)
        ),
    }
    tables = {name: print_table(name, makers[name]()) for name in options.tables}
    if options.output_file is not None:
        with open(options.output_file, "w") as file:
            json.dump(tables, file, indent=1)


if __name__ == "__main__":
    main()
