"""Compute the losses of distillation, in float32.

Source: arXiv:2410.20535, section 3: L_grid on the teacher's patch features, L_cls on its image embedding, L_rgb on the
image itself; all are mean squared errors. L_level is ours: the teacher's layers, for a column of levels per location;
so is a second distance of features, which large errors and the length of features decide less.

Legend: B images, L locations, N levels, C width of a level, F feature width, (rows, cols) the grid of the targets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modeling_apm import APMModelOutput

# How features are compared with the teacher's: the paper's mean squared error, or the sum of smooth L1 and 1 - cosine.
DISTANCES = ("mse", "smooth_l1_cosine")


@dataclass(frozen=True)
class DistillationTargets:
    """Hold a teacher's outputs for B images at L locations.

    Args:
        image_embeds: `(B, F)`.
        features: `(B, L, F)`.
        rgb: `(B, L, 3)`, in [0, 1], of the main teacher.
        levels: `(B, L, N, C)`, normalised by [`normalise_levels`], where the student predicts levels.
        grid: (rows, cols) of the teacher's patches, row-major, at or between which the locations lie.
        coordinates: (y, x) of the locations, `(L, 2)`, or `(B, L, 2)` where images have different ones; None for the
            centres of the grid.
    """

    image_embeds: Tensor
    features: Tensor
    rgb: Tensor | None = None
    levels: Tensor | None = None
    grid: tuple[int, int] = (0, 0)
    coordinates: Tensor | None = None

    def at(self, locations: Tensor | None) -> "DistillationTargets":
        """Select what losses compare of the locations with these indices `(L',)`; None keeps all."""
        if locations is None:
            return self
        rgb, levels = (None if x is None else x[:, locations] for x in (self.rgb, self.levels))
        return DistillationTargets(self.image_embeds, self.features[:, locations], rgb, levels)


@dataclass(frozen=True)
class LossWeights:
    """Weigh the losses; a loss of weight 0 is not computed.

    Raises:
        ValueError: for a negative weight, or where all are 0.
    """

    grid: float = 1.0
    cls: float = 1.0
    rgb: float = 1.0
    level: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.grid, self.cls, self.rgb, self.level)
        # Levels alone are not enough: the features that they stand beside have to be learnt.
        if not all(0 <= weight < float("inf") for weight in weights) or not any(weights[:3]):
            raise ValueError(f"loss weights: expected numbers >= 0, one of grid, cls and rgb positive, got {self}")


def distillation_losses(
    outputs: APMModelOutput,
    targets: DistillationTargets,
    weights: LossWeights,
    *,
    distance: str = "mse",
    feature_mean: Tensor | None = None,
    feature_std: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return those of L_grid, L_cls, L_rgb and L_level that are weighted, and their weighted sum as `loss`.

    Levels count where there are targets for them.

    Args:
        distance: one of `DISTANCES`, of L_grid and L_cls.
        feature_mean, feature_std: `(F,)`, and `(F,)` or `()`, of the teacher's features: L_grid and L_cls then compare
            in the standardised space.

    Raises:
        ValueError: where colours are weighted and the student has no RGB head, or levels of another shape than its.
    """
    if weights.rgb and outputs.rgb is None:
        raise ValueError("rgb: expected a student with use_rgb_head=True, or a weight of 0, got a student without")
    if weights.level and targets.levels is not None:
        given, wanted = None if outputs.levels is None else outputs.levels.shape, targets.levels.shape
        if given != wanted:
            raise ValueError(f"levels: expected a student with levels of shape {tuple(wanted)}, got {given}")
    pairs = {
        "grid": (outputs.last_hidden_state, targets.features),
        "cls": (outputs.pooler_output, targets.image_embeds),
        "rgb": (outputs.rgb, targets.rgb),
        "level": (outputs.levels, targets.levels),
    }
    losses = {}
    for name, (output, target) in pairs.items():
        if output is None or target is None or not getattr(weights, name):
            continue
        output, target = output.float(), target.float()
        if name in ("grid", "cls") and feature_mean is not None and feature_std is not None:
            output, target = (output - feature_mean) / feature_std, (target - feature_mean) / feature_std
        if name in ("grid", "cls") and distance == "smooth_l1_cosine":
            cosine = F.cosine_similarity(output, target, dim=-1).mean()
            losses[f"loss_{name}"] = F.smooth_l1_loss(output, target) + 1 - cosine
        else:
            losses[f"loss_{name}"] = F.mse_loss(output, target)
    total = sum(getattr(weights, name.removeprefix("loss_")) * loss for name, loss in losses.items())
    return {"loss": torch.as_tensor(total), **losses}
