"""Ablate test-time training: change one factor at a time and leave everything else as in the base.

The base is the paper's model and recipe (arXiv:2410.20535, Sec. 4), except that a step samples the locations it pools.
Factors are those the paper ablates: losses (Sec. 3), trigger column, local patch, pooling, parameters, depth, steps,
and the number of sampled locations. All variants get the same images and the same teacher outputs.

`ablations.jsonl` in the output folder has a line per distinct setting, written when it is done: an interrupted run can
be resumed, and levels that amount to the same setting are fitted once.

Legend: N images, L locations, F feature width, S the model's image side, (rows, cols) a grid.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils.logging import tqdm

from apm_hf.configuration_apm import APMConfig
from apm_hf.evaluation.labels.benchmarks import LabelledImages
from apm_hf.evaluation.plots import COLOURS, error_bars
from apm_hf.evaluation.statistics import Interval, mean_interval, paired_interval
from apm_hf.evaluation.tables import NOTHING, difference_cell, markdown_table, percent
from apm_hf.islands.figures import load_matplotlib
from apm_hf.modeling_apm import APMModel
from apm_hf.runs import provenance
from apm_hf.runs.files import write_atomically
from apm_hf.teachers import Teacher
from apm_hf.teachers.matching import matching_image_processor
from apm_hf.teachers.targets import rgb_targets
from apm_hf.teachers.zero_shot import class_embeds, classify
from apm_hf.ttt import Adapted, TTTConfig, adapt
from apm_hf.ttt.targets import TTTTargets

FACTORS = {
    "losses": "Losses",
    "trigger": "Trigger column",
    "local_patch": "Local patch in the query",
    "pooling": "Pooling",
    "parameters": "Parameters: width of the first hidden layer",
    "depth": "Hidden layers of one width",
    "steps": "Gradient steps",
    "locations": "Locations a step",
}
LOSSES = ("cls", "grid", "rgb")
BASE_RECIPE = TTTConfig.preset("paper", num_locations=16)
BASE = "base"  # level added to a factor none of whose levels equals the base
NUM_PROBES = 4  # images whose adapted models are kept to compare single locations
_UNORDERED = ("losses", "trigger", "local_patch", "pooling")
# Factors on all hidden widths: 7, 23, 54 and 108 million parameters for `clip-ttt`.
_WIDTHS = (5 / 16, 1, 29 / 16, 11 / 4)
_RESULTS = "ablations.jsonl"


@dataclass(frozen=True)
class Variant:
    """Describe one level of a factor.

    Args:
        factor: one of `FACTORS`.
        level: its name in tables.
        config, recipe: what differs from the base's [`APMConfig`] and [`TTTConfig`].
        losses: some of `LOSSES`; images are always classified by the pooled feature.

    Raises:
        ValueError: for an unknown factor or loss, or no loss.
    """

    factor: str
    level: str
    config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    losses: tuple[str, ...] = ("cls",)

    def __post_init__(self) -> None:
        if self.factor not in FACTORS:
            raise ValueError(f"factor: expected one of {list(FACTORS)}, got {self.factor!r}")
        if not self.losses or not set(self.losses) <= set(LOSSES):
            raise ValueError(f"losses: expected some of {list(LOSSES)}, got {list(self.losses)}")

    def settings(self, base: APMConfig, recipe: TTTConfig) -> tuple[APMConfig, TTTConfig]:
        """Return the base's model and recipe with this level applied."""
        architecture = {name: getattr(base, name) for name in _architecture_fields()}
        return APMConfig(**{**architecture, **self.config}), dataclasses.replace(recipe, **self.recipe)

    def describe(self, base: APMConfig, recipe: TTTConfig) -> dict[str, Any]:
        """Return all settings that this level results in; equal for levels that amount to the same."""
        config, recipe = self.settings(base, recipe)
        model = {name: getattr(config, name) for name in _architecture_fields()}
        return {"model": model, "recipe": asdict(recipe), "losses": sorted(self.losses)}


@dataclass(frozen=True)
class AblationRow:
    """Hold the scores of a variant.

    Args:
        accuracy: top-1, in [0, 1].
        difference: top-1 minus the teacher's top-1 on the same images.
        agreement: share of the images for which the teacher's class is predicted.
        cosine: mean between the pooled feature and the teacher's embedding.
        location_cosine: mean over pairs of locations of an image, over `NUM_PROBES` images; 1 if all locations have
            the same feature (collapse).
        num_images: number of images fitted.
        parameters: number of parameters of the model.
        gflops: cost of fitting an image, matrix products only.
        seconds: per image, without drawing the initial weights.
        device: device that `seconds` was measured on.
    """

    accuracy: Interval
    difference: Interval
    agreement: float
    cosine: float
    location_cosine: float
    num_images: int
    parameters: int
    gflops: float
    seconds: float
    device: str


Results = Sequence[tuple[Variant, AblationRow]]


@dataclass(frozen=True)
class AblationTask:
    """Hold N images and their teacher's outputs, shared by all variants.

    Args:
        pixel_values: `(N, 3, S, S)`, for the model.
        image_embeds, features: `(N, F)` and `(N, rows, cols, F)`, the teacher's.
        rgb: `(N, rows, cols, 3)`, in [0, 1], mean colours of the cells of the model's grid.
        text_embeds: `(K, F)`.
        labels: `(N,)`.
        device: device of the models.
        source: identifies the teacher and the images in the result file.
    """

    pixel_values: Tensor
    image_embeds: Tensor
    features: Tensor
    rgb: Tensor
    text_embeds: Tensor
    labels: Tensor
    device: torch.device
    source: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def build(
        cls, teacher: Teacher, images: LabelledImages, base: APMConfig, *, seed: int = 0, batch_size: int = 16
    ) -> "AblationTask":
        """Run the teacher once over all images.

        Args:
            base: configuration of the model, as wide as the teacher; variants share its image size and grid.
            seed: seed of the images' order; expensive variants use only the first ones.

        Raises:
            ValueError: for a model of another width, or no more than `NUM_PROBES` images.
        """
        if base.feature_size != teacher.feature_size:
            raise ValueError(f"feature_size: expected the teacher's {teacher.feature_size}, got {base.feature_size}")
        if len(images) <= NUM_PROBES:
            raise ValueError(f"num_images: expected more than {NUM_PROBES}, got {len(images)}")
        order = np.random.default_rng(seed).permutation(len(images)).tolist()
        processor = matching_image_processor(teacher, base.image_size)
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        parts: list[tuple[Tensor, ...]] = []
        for start in range(0, len(order), batch_size):
            batch = [images.image(index) for index in order[start : start + batch_size]]
            pixels = processor(batch, return_tensors="pt")["pixel_values"]
            outputs = teacher.encode_images(batch)
            assert outputs.image_embeds is not None and outputs.features is not None
            side = base.grid_size
            rgb = rgb_targets(pixels, side, side, mean=mean, std=std).unflatten(1, (side, side))
            parts.append((pixels, outputs.image_embeds, outputs.features, rgb))
        texts = class_embeds(teacher, images.class_names, images.templates)
        pixels, embeds, features, rgb = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        labels = torch.as_tensor(np.asarray(images.labels)[order])
        source = {"teacher": teacher.name, "images": images.title, "num_images": len(images), "seed": seed}
        source |= {"templates": list(images.templates), "from": dict(images.source)}
        return cls(pixels, embeds, features, rgb, texts.cpu(), labels, teacher.device, source)

    def targets(self, rows: slice, losses: Sequence[str]) -> TTTTargets:
        names = {"cls": "image_embeds", "grid": "features", "rgb": "rgb"}
        return TTTTargets(**{names[loss]: getattr(self, names[loss])[rows] for loss in losses})

    def classes(self, embeds: Tensor) -> Tensor:
        """Return the classes `(B,)` predicted for embeddings `(B, F)`."""
        return classify(embeds, self.text_embeds).argmax(dim=1)

    def teacher_accuracy(self) -> Interval:
        return mean_interval((self.classes(self.image_embeds) == self.labels).numpy())


def variants(
    base: APMConfig, recipe: TTTConfig = BASE_RECIPE, factors: Sequence[str] = tuple(FACTORS)
) -> list[Variant]:
    """Return the levels of the factors, in order, with the base once among those of each factor.

    Levels of `locations` that exceed the grid's number of locations are omitted.

    Raises:
        ValueError: for an unknown factor.
    """
    if unknown := [factor for factor in factors if factor not in FACTORS]:
        raise ValueError(f"factors: expected some of {list(FACTORS)}, got {unknown}")
    widths = [[round(share * width) for width in base.hidden_sizes] for share in _WIDTHS]
    middle = base.hidden_sizes[len(base.hidden_sizes) // 2]
    chosen = [("cls",), ("cls", "grid"), ("cls", "rgb"), ("cls", "grid", "rgb")]
    every = [
        *(Variant("losses", " + ".join(f"L_{loss}" for loss in losses), losses=losses) for losses in chosen),
        # L_grid does not train the pooling's attention, so the mean of the features is classified.
        Variant("losses", "L_grid", {"pooling": "mean"}, losses=("grid",)),
        Variant("trigger", "T_c", {"trigger_source": "conv"}),
        Variant("trigger", "T_vit", {"trigger_source": "embedding"}),
        *(Variant("local_patch", level, {"local_patch": level == "on"}) for level in ("off", "on")),
        *(Variant("pooling", pooling, {"pooling": pooling}) for pooling in ("mean", "attention")),
        *(Variant("parameters", str(sizes[0]), {"hidden_sizes": sizes}) for sizes in widths),
        *(Variant("depth", f"{count} x {middle}", {"hidden_sizes": [middle] * count}) for count in range(1, 6)),
        *(Variant("steps", str(steps), recipe={"steps": steps}) for steps in (1, 5, 10, 20, 40)),
        *(
            Variant("locations", str(count), recipe={"num_locations": count})
            for count in (1, 4, 16, 64, 256)
            if count <= base.num_locations
        ),
    ]
    levels = []
    for factor in dict.fromkeys(factors):
        of_factor = [variant for variant in every if variant.factor == factor]
        if not any(is_base(variant, base, recipe) for variant in of_factor):
            of_factor.insert(0, Variant(factor, BASE))
        levels += of_factor
    return levels


def is_base(variant: Variant, base: APMConfig, recipe: TTTConfig) -> bool:
    """Return whether a level changes nothing."""
    return variant.describe(base, recipe) == Variant(variant.factor, BASE).describe(base, recipe)


def run_variant(
    variant: Variant,
    task: AblationTask,
    *,
    base: APMConfig,
    recipe: TTTConfig = BASE_RECIPE,
    num_slow: int = 8,
    max_gflops: float = 150.0,
    batch_size: int = 8,
) -> AblationRow:
    """Fit a model to each image and score it.

    Args:
        num_slow: number of images, the first of the task, for a variant that takes more than `max_gflops` per image.
        batch_size: images fitted at a time.

    Raises:
        ValueError: if a fit diverged or `num_slow` is too small.
    """
    if num_slow <= NUM_PROBES:
        raise ValueError(f"num_slow: expected more than {NUM_PROBES}, got {num_slow}")
    config, recipe = variant.settings(base, recipe)
    # Random weights are drawn once and shared by all fits.
    recipe = dataclasses.replace(recipe, start="model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = APMModel(config).eval().requires_grad_(False).to(task.device)
    routed = config.trigger_source == "embedding"
    uses_pixels = not routed or config.local_patch

    def fit(start: int, stop: int, *, keep_models: bool = False) -> tuple[Adapted, Tensor]:
        rows = slice(start, stop)
        adapted = adapt(
            model,
            task.pixel_values[rows] if uses_pixels else None,
            task.targets(rows, variant.losses),
            config=recipe,
            trigger_column=task.image_embeds[rows] if routed else None,
            keep_models=keep_models,
        )
        if adapted.diverged.any():
            raise ValueError(f"{variant.factor}, {variant.level}: expected fits that converge, got divergence")
        return adapted, adapted.image_embeds.cpu()

    # Not timed: the first fit is slower.
    with FlopCounterMode(display=False) as counter:
        probes, first = fit(0, NUM_PROBES, keep_models=True)
    gflops = counter.get_total_flops() / NUM_PROBES / 1e9
    features = probes.query().last_hidden_state
    assert features is not None
    local = location_cosine(features)
    del probes, features  # models are large
    num_images = min(num_slow, len(task)) if gflops > max_gflops else len(task)
    started, starts = time.perf_counter(), range(NUM_PROBES, num_images, batch_size)
    embeds = torch.cat([first, *(fit(start, min(start + batch_size, num_images))[1] for start in starts)])
    seconds = (time.perf_counter() - started) / (num_images - NUM_PROBES)

    embeds_teacher, labels = task.image_embeds[:num_images], task.labels[:num_images]
    predicted, teacher_classes = task.classes(embeds), task.classes(embeds_teacher)
    correct = (predicted == labels).numpy()
    return AblationRow(
        accuracy=mean_interval(correct),
        difference=paired_interval(correct, (teacher_classes == labels).numpy()),
        agreement=(predicted == teacher_classes).double().mean().item(),
        cosine=F.cosine_similarity(embeds, embeds_teacher).mean().item(),
        location_cosine=local,
        num_images=num_images,
        parameters=model.num_parameters(),
        gflops=gflops,
        seconds=seconds,
        device=provenance.computer(),
    )


def location_cosine(features: Tensor) -> float:
    """Return the mean cosine between two different locations of an image, for features `(B, L, F)`."""
    units = F.normalize(features.cpu().double(), dim=-1)
    num_locations = units.shape[1]
    # Over all pairs, without those of a location with itself.
    total = units.sum(dim=1).square().sum(dim=-1) - num_locations
    return (total / (num_locations * (num_locations - 1))).mean().item()


def run_ablations(
    task: AblationTask,
    output_dir: str | os.PathLike[str],
    *,
    base: APMConfig,
    recipe: TTTConfig = BASE_RECIPE,
    factors: Sequence[str] = tuple(FACTORS),
    num_slow: int = 8,
    max_gflops: float = 150.0,
    batch_size: int = 8,
) -> Results:
    """Score the levels that `output_dir` does not have yet, and write `ablations.md` and `ablations.png` of all.

    Lines of other settings, teachers or images stay in `ablations.jsonl` and are not reported.

    Raises:
        ValueError: as [`variants`] and [`run_variant`].
    """
    levels = variants(base, recipe, factors)
    folder = Path(output_dir)
    path = folder / _RESULTS
    stored = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines: dict[str, dict[str, Any]] = {line["key"]: line for line in stored}
    common = {"task": task.source, "num_slow": num_slow, "max_gflops": max_gflops}
    results = []
    for variant in (progress := tqdm(levels, disable=None)):
        progress.set_description(f"{variant.factor}: {variant.level}")
        settings = {**variant.describe(base, recipe), **common}
        key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
        if key not in lines:
            row = run_variant(
                variant,
                task,
                base=base,
                recipe=recipe,
                num_slow=num_slow,
                max_gflops=max_gflops,
                batch_size=batch_size,
            )
            lines[key] = {"key": key, **asdict(row), "settings": settings}
            write_atomically(path, (json.dumps(line, default=str) + "\n" for line in lines.values()))
        results.append((variant, _read_row(lines[key])))
    write_atomically(folder / "ablations.md", ablation_report(results, task, base=base, recipe=recipe))
    write_atomically(folder / "ablations.png", draw_ablations(results, task, base=base, recipe=recipe))
    return results


def ablation_report(results: Results, task: AblationTask, *, base: APMConfig, recipe: TTTConfig) -> str:
    """Return markdown: the base, then a table per factor, whose first line is the teacher."""
    header = ["level", "top-1, %", "difference to the teacher, points", "agreement with it, %", "cosine to it"]
    header += ["cosine between locations", "parameters, M", "GFLOPs/image", "s/image", "images"]
    local = f"{location_cosine(task.features[:NUM_PROBES].flatten(1, 2)):.3f}"
    accuracy = percent(task.teacher_accuracy(), len(task))
    teacher = ["teacher", accuracy, *[NOTHING] * 3, local, *[NOTHING] * 3, str(len(task))]
    sizes = "-".join(map(str, base.hidden_sizes))
    name = str(task.source["teacher"])
    name = Path(name).name if os.path.exists(name) else name
    devices = "; ".join(dict.fromkeys(row.device for _, row in results))
    parts = [
        "# Ablations of test-time training\n",
        f"Teacher `{name}`, {task.source['images']}, {len(task)} images; {devices}. The base, in "
        f"bold: hidden layers {sizes}, trigger `{base.trigger_source}`, pooling `{base.pooling}`, "
        f"{recipe.steps} steps of Adam at {recipe.learning_rate:g}, {recipe.num_locations or 'all'} locations a step, "
        "L_cls. Brackets are 95 % intervals; a difference is over the images of its line. Cosine between locations: 1 "
        f"means collapsed, {NUM_PROBES} images.\n",
    ]
    for factor, levels in _by_factor(results).items():
        rows = [
            [
                f"**{variant.level}**" if is_base(variant, base, recipe) else variant.level,
                percent(row.accuracy, row.num_images),
                difference_cell(row.difference),
                f"{100 * row.agreement:.1f}",
                f"{row.cosine:.4f}",
                f"{row.location_cosine:.3f}",
                f"{row.parameters / 1e6:.3g}",
                f"{row.gflops:.3g}",
                f"{row.seconds:.3g}",
                str(row.num_images),
            ]
            for variant, row in levels
        ]
        parts.append(f"## {FACTORS[factor]}\n\n{markdown_table(header, [teacher, *rows])}")
    return "\n".join(parts)


def draw_ablations(results: Results, task: AblationTask, *, base: APMConfig, recipe: TTTConfig) -> bytes:
    """Draw a panel per factor, top-1 and the cosine to the teacher by level; equal results give equal PNG bytes."""
    matplotlib, figure_module = load_matplotlib()
    by_factor, teacher = _by_factor(results), task.teacher_accuracy()
    columns = min(4, len(by_factor))
    num_rows = math.ceil(len(by_factor) / columns)
    with matplotlib.style.context("default", after_reset=True):
        size = (max(3.1 * columns, 5.5), 2.9 * num_rows + 0.5)
        figure = figure_module.Figure(figsize=size, layout="constrained", dpi=110)
        grid = list(figure.subplots(num_rows, columns, squeeze=False, sharey=True).flat)
        for axes, (factor, levels) in zip(grid, by_factor.items(), strict=False):
            places, cosines = range(len(levels)), [100 * row.cosine for _, row in levels]
            for place, (variant, _) in zip(places, levels, strict=True):
                if is_base(variant, base, recipe):
                    axes.axvspan(place - 0.3, place + 0.3, color="#EEEEEE", zorder=0, label="base")
            axes.axhline(100 * teacher.mean, color="black", linewidth=1, label="teacher, top-1")
            style = {"color": COLOURS[0], "marker": "o", "markersize": 4, "linestyle": "none"}
            error_bars(axes, places, [row.accuracy for _, row in levels], label="APM, top-1", **style)
            style = {"color": COLOURS[1], "marker": ".", "markersize": 4, "linestyle": "none"}
            axes.plot(places, cosines, label="cosine to the teacher x 100", **style)
            if factor not in _UNORDERED:
                first = int(levels[0][0].level == BASE)  # has no place on the axis of the others
                accuracies = [100 * row.accuracy.mean for _, row in levels]
                axes.plot(places[first:], accuracies[first:], color=COLOURS[0], linewidth=1.3)
                axes.plot(places[first:], cosines[first:], color=COLOURS[1], linewidth=0.7)
            axes.set_xticks(places, [variant.level.replace(" + ", "\n") for variant, _ in levels], fontsize=7)
            axes.set_title(FACTORS[factor], fontsize=9)
            axes.set_xlim(-0.5, len(levels) - 0.5)
            axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        for axes in grid[len(by_factor) :]:
            axes.remove()
        for axes in grid[: len(by_factor) : columns]:
            axes.set_ylabel("%")
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def _by_factor(results: Results) -> dict[str, list[tuple[Variant, AblationRow]]]:
    factors = dict.fromkeys(variant.factor for variant, _ in results)
    return {factor: [result for result in results if result[0].factor == factor] for factor in factors}


def _read_row(line: Mapping[str, Any]) -> AblationRow:
    values = {column.name: line[column.name] for column in dataclasses.fields(AblationRow)}
    intervals = {name: Interval(**values[name]) for name in ("accuracy", "difference")}
    return AblationRow(**{**values, **intervals})


def _architecture_fields() -> list[str]:
    return [name for name in APMConfig.__annotations__ if name not in ("model_type", "sub_configs", "text_config")]
