"""Measure a student on a validation set, beside controls, and draw its features beside its teacher's.

Legend: B images, L locations, F feature width, (rows, cols) the teacher's grid.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
from torch import Tensor
from torch.nn import functional as F

from ..islands import PCAColours
from ..modeling_apm import APMModelOutput
from .controls import NAMES, Controls
from .losses import DistillationTargets

TILE = 112  # side of one panel of a validation picture, in pixels


class ValidationMetrics:
    """Accumulate sums over images, in float64; every image counts once for any batches and processes."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_images = 0

    @staticmethod
    def statistics(
        outputs: APMModelOutput, targets: DistillationTargets, controls: Controls | None = None
    ) -> dict[str, Tensor]:
        """Return what is summed, one row per image: `(B, ...)`, ready to be gathered from all processes.

        Args:
            controls: of the head; R² is measured in their units.
        """
        assert outputs.last_hidden_state is not None and outputs.pooler_output is not None
        output, target = outputs.last_hidden_state.float(), targets.features.float()
        statistics = {
            "feature_cosine": F.cosine_similarity(output, target, dim=-1).mean(dim=1),
            "embed_cosine": F.cosine_similarity(outputs.pooler_output.float(), targets.image_embeds.float()),
            "mean": target.mean(dim=1),  # (B, F)
            "direction": F.normalize(target, dim=-1).mean(dim=1),  # (B, F)
        }
        if controls is not None:
            error = (output - target) / controls.std.to(target.device)
            statistics["error"] = error.square().sum(dim=(1, 2))
        if outputs.rgb is not None and targets.rgb is not None:
            statistics["rgb_mse"] = (outputs.rgb.float() - targets.rgb.float()).square().mean(dim=(1, 2))
        if outputs.levels is not None and targets.levels is not None:
            cosines = F.cosine_similarity(outputs.levels.float(), targets.levels.float(), dim=-1)  # (B, L, N)
            statistics["level_cosine"] = cosines.mean(dim=(1, 2))
        return statistics

    def add(self, statistics: dict[str, Tensor]) -> None:
        """Add the images of one (gathered) batch."""
        self.num_images += len(statistics["feature_cosine"])
        for name, values in statistics.items():
            self.sums[name] = self.sums.get(name, 0) + values.cpu().double().sum(dim=0)

    def compute(self, controls: Controls | None = None) -> dict[str, float]:
        """Return means over images and, with controls, R² of the student as `feature_r2`, and theirs.

        `mean_cosine` is the cosine that the mean of these features, a constant, has to them.

        Raises:
            ValueError: where no image was added.
        """
        if not self.num_images:
            raise ValueError("validation: expected at least one image, got none")
        values: dict[str, float] = {}
        if controls is not None:
            values["feature_r2"] = 1 - self.sums["error"].item() / self.num_images / controls.variance
            values |= controls.figures
        for name in ("feature_cosine", "embed_cosine", "rgb_mse", "level_cosine"):
            if name in self.sums:
                values[name] = (self.sums[name] / self.num_images).item()
        mean = F.normalize(self.sums["mean"], dim=0)
        values["mean_cosine"] = (self.sums["direction"] @ mean / self.num_images).item()
        return values


def comparison(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return R² of the student and of every control of a validation, by the names that tables have."""
    rows = {"feature_r2": "this student", **NAMES}
    return [(title, metrics[name]) for name, title in rows.items() if name in metrics]


def verdict(metrics: Mapping[str, float]) -> str:
    """Say in a sentence which controls a student is above; empty where a validation has none."""
    (_, student), *controls = comparison(metrics) or [("", 0.0)]
    if not controls:
        return ""
    above = [title for title, value in controls if student > value]
    below = [title for title, value in controls if student <= value]
    parts = [f"{word} {', '.join(titles)}" for word, titles in (("above", above), ("not above", below)) if titles]
    return f"this student is {'; '.join(parts)}"


def worse_than_constant(metrics: Mapping[str, float]) -> str | None:
    """Say that a student is no better than the mean of the teacher's features; None for one that is.

    A validation of too few images for R² is judged by its cosine alone.
    """
    figures = {
        "R²": (metrics.get("feature_r2"), metrics.get("mean_r2")),
        "cosine": (metrics.get("feature_cosine"), metrics.get("mean_cosine")),
    }
    pairs = {name: (a, b) for name, (a, b) in figures.items() if a is not None and b is not None}
    if all(student > constant for student, constant in pairs.values()):
        return None
    student, constant = (" and ".join(f"{name} {pair[place]:.3f}" for name, pair in pairs.items()) for place in (0, 1))
    return (
        f"this student is no better than a constant: its features have {student}, the mean of the teacher's features "
        f"{constant}; train for more steps, on more images or with a higher learning rate"
    )


def card_figures(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return the figures of a model's card, fields of [`apm_hf.publishing.cards.CardFacts`], from a validation's.

    Controls stand in a table beside the student, and not among the results that are the model's.
    """
    others, said = {*NAMES, "mean_cosine"}, verdict(metrics)
    rows = "\n".join(f"| {title} | {value:.4f} |" for title, value in comparison(metrics))
    table = (
        "R² of features on these images after the mean of every position is removed; 1 is the teacher. Controls are "
        f"fitted to training images.\n\n| | R² |\n| --- | ---: |\n{rows}\n\nThat is, {said}."
    )
    return {
        "metrics": {name: value for name, value in metrics.items() if name.rpartition("/")[2] not in others},
        "comparison": table if said else "",
        "warning": worse_than_constant(metrics) or "",
    }


def validation_picture(
    outputs: APMModelOutput, targets: DistillationTargets, grid: tuple[int, int], *, num_images: int
) -> PIL.Image.Image:
    """Draw one row per image: its colours, the teacher's features, the student's in the same colours, its RGB."""
    assert outputs.last_hidden_state is not None and targets.rgb is not None
    num_images = min(num_images, len(targets.features))
    teacher, student = targets.features[:num_images], outputs.last_hidden_state[:num_images]
    colours = PCAColours.fit(teacher)
    columns = [targets.rgb[:num_images].float().cpu().numpy(), colours(teacher), colours(student)]
    if outputs.rgb is not None:
        columns.append(outputs.rgb[:num_images].float().cpu().clamp(0, 1).numpy())
    rows = [np.concatenate([_tile(column[i], grid) for column in columns], axis=1) for i in range(num_images)]
    return PIL.Image.fromarray(np.concatenate(rows))


def _tile(colours: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    image = PIL.Image.fromarray((colours.reshape(*grid, 3) * 255).round().astype(np.uint8))
    return np.asarray(image.resize((TILE, TILE), PIL.Image.Resampling.NEAREST))
