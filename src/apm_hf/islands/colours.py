"""Features -> colours: the first three principal components, as in DINOv2 (arXiv:2304.07193, Fig. 1).

Legend: B images, L locations, F feature width, (rows, cols) a map of locations, row-major.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Shares of the values that are clipped on either side before colours are stretched to [0, 1].
CLIPPED = 0.02


@dataclass(frozen=True)
class PCAColours:
    """Features -> colours: three principal directions and one stretch, fitted once, so that colours compare.

    Args:
        mean: `(F,)`.
        directions: `(F, 3)`; each one's entry of largest magnitude is positive, so that the same features give the
            same colours everywhere.
        low, high: `(3,)`, the projections that become 0 and 1.
    """

    mean: Tensor
    directions: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> "PCAColours":
        """Fit to features `(..., F)` of any number of images."""
        flat = features.detach().flatten(0, -2).double().cpu()
        mean = flat.mean(dim=0)
        directions = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:3].T  # (F, 3), or fewer than 3
        directions = torch.nn.functional.pad(directions, (0, 3 - directions.shape[1]))
        directions = directions * directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
        shares = torch.tensor([CLIPPED, 1 - CLIPPED], dtype=flat.dtype)
        low, high = torch.quantile((flat - mean) @ directions, shares, dim=0)
        return cls(mean, directions, low, high)

    def __call__(self, features: Tensor) -> np.ndarray:
        """Colours `(..., 3)` in [0, 1] of features `(..., F)`."""
        projected = (features.detach().double().cpu() - self.mean) @ self.directions
        return ((projected - self.low) / (self.high - self.low).clamp_min(1e-12)).clamp(0, 1).float().numpy()
