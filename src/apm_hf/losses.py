"""What a student is asked for: tensors in, scalars out, in float32.

Source: arXiv:2410.20535, section 3: L_grid on the teacher's patch features, L_cls on its image embedding, L_rgb on the
image itself; all are mean squared errors.

Legend: B images, L locations, F feature width, (rows, cols) the grid of the targets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .modeling_apm import APMModelOutput


@dataclass(frozen=True)
class DistillationTargets:
    """A teacher's answers for B images, at L locations.

    Args:
        image_embeds: `(B, F)`.
        features: `(B, L, F)`.
        rgb: `(B, L, 3)`, in [0, 1].
    """

    image_embeds: Tensor
    features: Tensor
    rgb: Tensor

    def at(self, locations: Tensor | None) -> "DistillationTargets":
        """The same for the locations with these indices, `(L',)`; None for all of them."""
        if locations is None:
            return self
        return DistillationTargets(self.image_embeds, self.features[:, locations], self.rgb[:, locations])


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three losses; a loss of weight 0 is not computed.

    Raises:
        ValueError: for a negative weight, or where all are 0.
    """

    grid: float = 1.0
    cls: float = 1.0
    rgb: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.grid, self.cls, self.rgb)
        if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
            raise ValueError(f"loss weights: expected numbers >= 0, one of them positive, got {self}")


def distillation_losses(
    outputs: APMModelOutput, targets: DistillationTargets, weights: LossWeights
) -> dict[str, Tensor]:
    """L_grid, L_cls and L_rgb, as far as they are weighted, and their weighted sum under the name `loss`.

    Raises:
        ValueError: where colours are asked for and the student has no RGB head.
    """
    if weights.rgb and outputs.rgb is None:
        raise ValueError("rgb: expected a student with use_rgb_head=True, or a weight of 0, got a student without")
    pairs = {
        "grid": (outputs.last_hidden_state, targets.features),
        "cls": (outputs.pooler_output, targets.image_embeds),
        "rgb": (outputs.rgb, targets.rgb),
    }
    losses = {
        f"loss_{name}": F.mse_loss(answer.float(), target.float())
        for name, (answer, target) in pairs.items()
        if answer is not None and getattr(weights, name)
    }
    total = sum(getattr(weights, name.removeprefix("loss_")) * loss for name, loss in losses.items())
    return {"loss": torch.as_tensor(total), **losses}


def rgb_targets(pixel_values: Tensor, rows: int, cols: int, *, mean: Tensor, std: Tensor) -> Tensor:
    """Mean colour of every cell of a grid.

    Args:
        pixel_values: `(B, 3, H, W)`, normalised.
        rows, cols: the grid; it may be coarser or finer than the student's own.
        mean, std: `(3,)`, of the normalisation, which is undone.

    Returns:
        `(B, rows * cols, 3)`, in [0, 1], row-major.
    """
    pooled = F.adaptive_avg_pool2d(pixel_values.float(), (rows, cols))
    pooled = pooled * std[:, None, None] + mean[:, None, None]
    return pooled.flatten(2).transpose(1, 2)  # (B, 3, rows, cols) -> (B, L, 3)
