"""Measure what a student has to beat on its validation images: the mean feature, position alone, a ridge regression.

All three are fitted to training images of the student's. The regression goes from what the student reads, made small:
pixels around the place, the whole image in a few colours and, for a student that reads it, the teacher's embedding.

R² is that of dense students: in units of each feature's standard deviation, after the mean of every position is
removed, so that 0 is what the position alone could say of these very images, and 1 the teacher itself.

Legend: B images, L locations, F feature width, W inputs of the regression, (rows, cols) the teacher's grid.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..position_encoding import grid_coordinates, local_patches
from .feature_statistics import RunningStatistics
from .losses import DistillationTargets
from .ridge import NormalEquations, held_out

IMAGES = 512  # that controls are fitted to at most
PLACES = 64  # of each of them that the regression is fitted to
WINDOW, SCALES = 4, (1, 2, 4)  # pixels along a cell of the grid, and cells along the windows around a place
WHOLE = 4  # pixels along the whole image

# Of a validation's figures, those of controls -> their names in tables.
NAMES = {
    "mean_r2": "mean feature",
    "position_r2": "position alone",
    "ridge_r2": "ridge regression",
    "bilinear_r2": "bilinear interpolation",
}

# A head's name -> what a batch's targets are; the inputs are the same for all heads.
Targets = Mapping[str, DistillationTargets]


@dataclass(frozen=True, eq=False)
class Controls:
    """Hold what the controls of one head reach, and the units in which R² is measured.

    Args:
        std: `(F,)`, standard deviations of the teacher's features over training images.
        variance: squared deviation of an image's features, in these units, from the mean of their position over all
            validation images; the mean over these images.
        figures: R² of every control: `mean_r2`, `position_r2` and `ridge_r2`.
    """

    std: Tensor
    variance: float
    figures: dict[str, float]


def measure_controls(
    training: Iterable[tuple[dict[str, Tensor], Targets]],
    validation: Iterable[tuple[dict[str, Tensor], Targets]],
    *,
    reads_embedding: bool = False,
    seed: int = 0,
) -> dict[str, Controls]:
    """Fit the controls of every head to training images, and measure them on validation images.

    Args:
        training, validation: batches, with `pixel_values`, and their targets by head.
        reads_embedding: whether the student reads the teacher's embedding.
        seed: of the places that the regression is fitted to.

    Returns:
        Controls by head; none where there are fewer than two validation images, or no training image.
    """
    generator = torch.Generator().manual_seed(seed)
    fits: dict[str, _Fit] = {}
    for batch, heads in training:
        for name, targets in heads.items():
            fits.setdefault(name, _Fit(targets, reads_embedding)).add(batch, targets, generator)
    for fit in fits.values():
        fit.solve()
    for batch, heads in validation:
        for name in fits.keys() & heads.keys():
            fits[name].measure(batch, heads[name])
    return {name: fit.controls() for name, fit in fits.items() if fit.num_measured > 1}


class _Fit:
    def __init__(self, targets: DistillationTargets, reads_embedding: bool) -> None:
        self.grid, self.reads_embedding = targets.grid, reads_embedding
        num_places, width = self.grid[0] * self.grid[1], targets.features.shape[-1]
        self.statistics = RunningStatistics(width)
        self.sums, self.counts = torch.zeros(num_places, width, dtype=torch.float64), torch.zeros(num_places)
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []  # an image's inputs, features and places
        self.num_measured = 0
        self.errors = dict.fromkeys(("mean", "position", "ridge"), 0.0)
        self.totals = torch.zeros(num_places, width, dtype=torch.float64)

    def add(self, batch: dict[str, Tensor], targets: DistillationTargets, generator: torch.Generator) -> None:
        """Take the images of a batch into account, whose features lie at all places or at the batch's `locations`."""
        features = targets.features.float().cpu()  # (B, L, F)
        num_images, num_locations = features.shape[:2]
        cells = torch.arange(num_locations).expand(num_images, -1)
        if targets.coordinates is not None:
            cells = batch["locations"].cpu()  # (B, L)
        self.statistics.add(features)
        self.sums.index_add_(0, cells.flatten(), features.flatten(0, 1).double())
        self.counts.index_add_(0, cells.flatten(), torch.ones(cells.numel()))
        drawn = torch.randperm(num_locations, generator=generator)[:PLACES]
        inputs = self._inputs(batch, targets, cells[:, drawn])
        self.rows += zip(inputs.half(), features[:, drawn].half(), cells[:, drawn], strict=True)

    def solve(self) -> None:
        mean, self.std = (values.float() for values in self.statistics.result())
        seen = self.counts[:, None].clamp(min=1)
        self.position = torch.where(self.counts[:, None] > 0, (self.sums / seen).float(), mean)  # (rows * cols, F)
        self.mean = (mean - self.position) / self.std  # beside the position's: (rows * cols, F)
        inputs = torch.cat([inputs for inputs, _, _ in self.rows]).float()
        self.input_mean, self.input_std = inputs.mean(dim=0), inputs.std(dim=0, correction=0).clamp(min=1e-3)
        equations = NormalEquations(inputs.shape[-1] + 1, self.position.shape[-1])
        for is_held, row in zip(held_out(len(self.rows)).tolist(), self.rows, strict=True):
            given, features, cells = row
            equations.add(self._standardised(given.float()), self._beside(features.float(), cells), held=is_held)
        self.weight = equations.solve()
        self.rows = []

    def measure(self, batch: dict[str, Tensor], targets: DistillationTargets) -> None:
        features = targets.features.float().cpu()
        cells = torch.arange(features.shape[1]).expand(len(features), -1)
        wanted = self._beside(features, cells)  # (B, L, F)
        found = self._standardised(self._inputs(batch, targets, cells)) @ self.weight
        for name, output in (("mean", self.mean), ("position", 0), ("ridge", found)):
            self.errors[name] += float((wanted - output).double().square().sum())
        self.totals += wanted.double().sum(dim=0)
        self.num_measured += len(features)

    def controls(self) -> Controls:
        total = self.errors["position"] - float(self.totals.square().sum()) / self.num_measured
        figures = {f"{name}_r2": 1 - error / total for name, error in self.errors.items()}
        return Controls(self.std, total / self.num_measured, figures)

    def _inputs(self, batch: dict[str, Tensor], targets: DistillationTargets, cells: Tensor) -> Tensor:
        """Return `(B, L, W)`, float32, for places `(B, L)` of the grid."""
        pixels, (rows, cols) = batch["pixel_values"].float().cpu(), self.grid
        small = F.adaptive_avg_pool2d(pixels, (WINDOW * rows, WINDOW * cols))
        local = local_patches(small, WINDOW, SCALES, grid_coordinates(rows, cols)[cells])
        shared = [F.adaptive_avg_pool2d(pixels, WHOLE).flatten(1)]
        if self.reads_embedding:
            shared.append(targets.image_embeds.float().cpu())
        return torch.cat([local, *(one[:, None].expand(-1, local.shape[1], -1) for one in shared)], dim=-1)

    def _standardised(self, inputs: Tensor) -> Tensor:
        """Standardise inputs, and put a one behind them."""
        inputs = (inputs - self.input_mean) / self.input_std
        return torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)

    def _beside(self, features: Tensor, cells: Tensor) -> Tensor:
        """Return features less the mean of their place, in standard deviations."""
        return (features - self.position[cells]) / self.std
