"""Other views of training images: random crops and mirror images, reproducible in any order.

A student that is distilled from few images learns more from them this way; its teacher is given the same view.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
from torch.utils.data import Dataset

from .images import decode_image

_ASPECT = 4 / 3  # crops are at most so much wider or taller than the picture is


class RandomCrops(Dataset):
    """Crop every image of a data set, and mirror half of them; which way depends on seed, epoch and row alone.

    Args:
        dataset: rows with images, by index.
        image_column: its column of images, decoded or not.
        min_area: the smallest share of a picture's area that a crop keeps; 1 only mirrors.
        seed: of the crops.
        views: K, to make K crops of every image that are the same in every epoch, rows K * i to K * i + K - 1 of image
            i, so that a teacher's features of them can be cached. 0 makes one crop of every image, another each epoch.

    Raises:
        ValueError: for a share outside (0, 1], or a negative number of views.
    """

    def __init__(
        self, dataset: Any, image_column: str, *, min_area: float = 0.3, seed: int = 0, views: int = 0
    ) -> None:
        if not 0 < min_area <= 1:
            raise ValueError(f"min_area: expected a share above 0 and at most 1, got {min_area}")
        if views < 0:
            raise ValueError(f"views: expected a number of crops or 0, got {views}")
        self.dataset, self.image_column = dataset, image_column
        self.min_area, self.seed, self.views, self.epoch = min_area, seed, views, 0

    @property
    def settings(self) -> dict[str, Any]:
        """Return the arguments that decide on the crops."""
        return {"min_area": self.min_area, "seed": self.seed, "views": self.views}

    def set_epoch(self, epoch: int) -> None:
        """Make other crops from now on, unless their number is fixed."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset) * max(1, self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: Mapping[str, Any] = self.dataset[index // max(1, self.views)]
        try:
            image = decode_image(row[self.image_column])
        except ValueError:
            return dict(row)  # unchanged: who makes batches counts it, or reports what is wrong
        rng = np.random.default_rng([self.seed, 0 if self.views else self.epoch, index])
        return {**row, self.image_column: self._view(image, rng)}

    def _view(self, image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
        area = rng.uniform(self.min_area, 1)
        stretch = np.exp(rng.uniform(-np.log(_ASPECT), np.log(_ASPECT)) / 2)
        shares = np.minimum(np.sqrt(area) * np.array([stretch, 1 / stretch]), 1)  # of width and height
        size = np.maximum(1, np.round(shares * image.size)).astype(int)
        left, top = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(image.size, size, strict=True))
        view = image.crop((left, top, left + int(size[0]), top + int(size[1])))
        return view.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else view
