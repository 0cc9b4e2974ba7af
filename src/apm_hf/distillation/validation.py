"""Measure a student on a validation set, and draw its features beside its teacher's.

Legend: B images, L locations, F feature width, (rows, cols) the teacher's grid.
"""

from collections.abc import Mapping

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from ..islands import PCAColours
from ..modeling_apm import APMModelOutput
from .losses import DistillationTargets

TILE = 112  # side of one panel of a validation picture, in pixels


class ValidationMetrics:
    """Accumulate sums over images, in float64; every image counts once for any batches and processes."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_images = 0

    @staticmethod
    def statistics(outputs: APMModelOutput, targets: DistillationTargets) -> dict[str, Tensor]:
        """Return what is summed, one row per image: `(B, ...)`, ready to be gathered from all processes."""
        assert outputs.last_hidden_state is not None and outputs.pooler_output is not None
        # R² takes a small difference of large sums; MPS has no float64.
        wide = torch.float32 if targets.features.device.type == "mps" else torch.float64
        output, target = outputs.last_hidden_state.to(wide), targets.features.to(wide)
        statistics = {
            "feature_cosine": F.cosine_similarity(output, target, dim=-1).mean(dim=1),
            "embed_cosine": F.cosine_similarity(outputs.pooler_output.float(), targets.image_embeds.float()),
            "error": (output - target).square().sum(dim=(1, 2)),
            "total": target.sum(dim=1),  # (B, F)
            "square": target.square().sum(dim=(1, 2)),
            "direction": F.normalize(target, dim=-1).mean(dim=1),  # (B, F)
            "count": torch.full((len(target),), target.shape[1], device=target.device),
        }
        if outputs.rgb is not None and targets.rgb is not None:
            statistics["rgb_mse"] = (outputs.rgb.float() - targets.rgb.float()).square().mean(dim=(1, 2))
        if outputs.levels is not None and targets.levels is not None:
            cosines = F.cosine_similarity(outputs.levels.float(), targets.levels.float(), dim=-1)  # (B, L, N)
            statistics["level_cosine"] = cosines.mean(dim=(1, 2))
        return statistics

    def add(self, statistics: dict[str, Tensor]) -> None:
        """Add the images of one (gathered) batch."""
        self.num_images += len(statistics["count"])
        for name, values in statistics.items():
            self.sums[name] = self.sums.get(name, 0) + values.cpu().double().sum(dim=0)

    def compute(self) -> dict[str, float]:
        """Return means over images, and R² of the features: 1 - error / variance about their mean over all locations.

        `mean_cosine` is the cosine that this mean, a constant, has to the features: a student has to be above it.

        Raises:
            ValueError: where no image was added.
        """
        if not self.num_images:
            raise ValueError("validation: expected at least one image, got none")
        variance = self.sums["square"] - self.sums["total"].square().sum() / self.sums["count"]
        values = {"feature_r2": (1 - self.sums["error"] / variance).item()}
        for name in ("feature_cosine", "embed_cosine", "rgb_mse", "level_cosine"):
            if name in self.sums:
                values[name] = (self.sums[name] / self.num_images).item()
        mean = F.normalize(self.sums["total"], dim=0)
        values["mean_cosine"] = (self.sums["direction"] @ mean / self.num_images).item()
        return values


def worse_than_constant(metrics: Mapping[str, float]) -> str | None:
    """Say that a student is no better than the mean of the teacher's features; None for one that is."""
    if metrics["feature_r2"] > 0 and metrics["feature_cosine"] > metrics["mean_cosine"]:
        return None
    return (
        f"this student is no better than a constant: its features have R² {metrics['feature_r2']:.3f} and cosine "
        f"{metrics['feature_cosine']:.3f} to the teacher's, the mean of the teacher's features R² 0 and cosine "
        f"{metrics['mean_cosine']:.3f}; train for more steps, on more images or with a higher learning rate"
    )


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
