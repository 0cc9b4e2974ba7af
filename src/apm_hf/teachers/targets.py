"""Convert a teacher's outputs to targets for a student, and cache those of a set of images in memory.

Legend: B or M images, L locations, N levels, C width of a level, F feature width, S image side,
(rows, cols) the targets' grid.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers.utils.logging import tqdm

from . import Teacher
from .dense_grids import encode_densely

BATCH_SIZE = 64


def normalise_levels(levels: Tensor) -> Tensor:
    """Normalise every token of every layer to mean 0 and variance 1 over its width, as a layernorm does.

    The layers of a transformer differ in scale; without this the top one would dominate a loss.

    Args:
        levels: `(..., C)`.
    """
    return F.layer_norm(levels.float(), levels.shape[-1:])


def rgb_targets(pixel_values: Tensor, rows: int, cols: int, *, mean: Tensor, std: Tensor) -> Tensor:
    """Return the mean colour of every cell of a grid.

    Args:
        pixel_values: `(B, 3, H, W)`, normalised.
        rows, cols: the grid; it may be coarser or finer than the student's.
        mean, std: `(3,)`, of the normalisation, which is undone.

    Returns:
        `(B, rows * cols, 3)`, in [0, 1], row-major.
    """
    pooled = F.adaptive_avg_pool2d(pixel_values.float(), (rows, cols))
    pooled = pooled * std[:, None, None] + mean[:, None, None]
    return pooled.flatten(2).transpose(1, 2)  # (B, 3, rows, cols) -> (B, L, 3)


class TargetCache(Dataset):
    """Hold rows of `pixel_values` `(3, S, S)`, `image_embeds` `(F,)`, `features` `(rows, cols, F)` and, if present,
    `levels` `(N, rows, cols, C)`, for [`distill`].

    Args:
        pixel_values: `(M, 3, S, S)`, the student's input.
        image_embeds: `(M, F)`.
        features: `(M, rows, cols, F)`.
        levels: `(M, N, rows, cols, C)`, normalised.
        order: `(M,)`; image i gets the targets of image `order[i]`. None is the identity.
    """

    def __init__(
        self,
        pixel_values: Tensor,
        image_embeds: Tensor,
        features: Tensor,
        *,
        levels: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        self.pixel_values, self.image_embeds, self.features = pixel_values, image_embeds, features
        self.levels = levels
        self.order = torch.arange(len(pixel_values)) if order is None else order

    @classmethod
    def build(
        cls,
        images: Sequence[Any],
        teacher: Teacher,
        image_processor: Any,
        *,
        factor: int = 1,
        layers: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        description: str | None = None,
    ) -> "TargetCache":
        """Run the teacher on every image.

        Args:
            images: PIL images, or anything else that both image processors take.
            image_processor: the student's.
            factor: refinement of the teacher's grid for the targets, see [`encode_densely`].
            layers: the teacher's layers for levels.
            dtype: dtype of the cached features and levels.
            description: text of the progress bar; None disables it.
        """
        if len(images) == 0:
            raise ValueError("images: expected at least one image, got none")
        pixels, embeds, features, levels = [], [], [], []
        starts = tqdm(range(0, len(images), BATCH_SIZE), desc=description, disable=description is None)
        for start in starts:
            batch = [images[i] for i in range(start, min(start + BATCH_SIZE, len(images)))]
            teacher_pixels = teacher.pixel_values(batch)
            outputs = encode_densely(teacher, teacher_pixels, factor, layers=layers)
            assert outputs.image_embeds is not None and outputs.features is not None
            pixels.append(image_processor(batch, return_tensors="pt")["pixel_values"])
            embeds.append(outputs.image_embeds.cpu())
            features.append(outputs.features.to("cpu", dtype))
            if outputs.levels is not None:
                levels.append(normalise_levels(outputs.levels).to("cpu", dtype))
        column = torch.cat(levels) if levels else None
        return cls(torch.cat(pixels), torch.cat(embeds), torch.cat(features), levels=column)

    def shuffled(self, seed: int) -> "TargetCache":
        """Return the shuffled control: the same targets, each assigned to another image."""
        if len(self) < 2:
            raise ValueError(f"shuffled: expected at least two images, got {len(self)}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        wrong = torch.empty_like(order)
        wrong[order] = order.roll(1)  # one cycle through all images, so no image gets its targets
        return TargetCache(self.pixel_values, self.image_embeds, self.features, levels=self.levels, order=wrong)

    def digest(self) -> str:
        """Return the SHA-256 of the contents of all rows."""
        digest = hashlib.sha256()
        for values in (self.pixel_values, self.image_embeds, self.features, self.levels, self.order):
            if values is not None:
                digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        target = self.order[index]
        row = {
            "pixel_values": self.pixel_values[index],
            "image_embeds": self.image_embeds[target],
            "features": self.features[target],
        }
        return row if self.levels is None else row | {"levels": self.levels[target]}
