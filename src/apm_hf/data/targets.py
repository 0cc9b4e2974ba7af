"""Images with their teacher's answers, in memory: what is asked once need not be asked again at every epoch.

Legend: N images, F feature width, S image side, (rows, cols) the teacher's grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from apm_hf.teachers import Teacher

BATCH_SIZE = 64


class TargetCache(Dataset):
    """Rows `pixel_values` `(3, S, S)`, `image_embeds` `(F,)` and `features` `(rows, cols, F)`, for [`distill`].

    Args:
        pixel_values: `(N, 3, S, S)`, the student's input.
        image_embeds: `(N, F)`.
        features: `(N, rows, cols, F)`.
        order: `(N,)`; image i gets the answer to image `order[i]`. None is the identity.
    """

    def __init__(
        self, pixel_values: Tensor, image_embeds: Tensor, features: Tensor, *, order: Tensor | None = None
    ) -> None:
        self.pixel_values, self.image_embeds, self.features = pixel_values, image_embeds, features
        self.order = torch.arange(len(pixel_values)) if order is None else order

    @classmethod
    def build(
        cls, images: Sequence[Any], teacher: Teacher, image_processor: Any, *, description: str | None = None
    ) -> "TargetCache":
        """Ask the teacher about every image.

        Args:
            images: PIL images, or anything else that both image processors take.
            image_processor: the student's.
            description: of the progress bar; None shows none.
        """
        if len(images) == 0:
            raise ValueError("images: expected at least one image, got none")
        pixels, embeds, features = [], [], []
        starts = tqdm(range(0, len(images), BATCH_SIZE), desc=description, disable=description is None)
        for start in starts:
            batch = [images[i] for i in range(start, min(start + BATCH_SIZE, len(images)))]
            answer = teacher.encode_images(batch)
            assert answer.image_embeds is not None and answer.features is not None
            pixels.append(image_processor(batch, return_tensors="pt")["pixel_values"])
            embeds.append(answer.image_embeds.cpu())
            features.append(answer.features.cpu())
        return cls(torch.cat(pixels), torch.cat(embeds), torch.cat(features))

    def shuffled(self, seed: int) -> "TargetCache":
        """The control: the same answers, every one given to another image than the one it was given for."""
        if len(self) < 2:
            raise ValueError(f"shuffled: expected at least two images, got {len(self)}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        wrong = torch.empty_like(order)
        wrong[order] = order.roll(1)  # one cycle through all images, so none keeps its own answer
        return TargetCache(self.pixel_values, self.image_embeds, self.features, order=wrong)

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        answer = self.order[index]
        return {
            "pixel_values": self.pixel_values[index],
            "image_embeds": self.image_embeds[answer],
            "features": self.features[answer],
        }
