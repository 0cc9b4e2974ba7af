"""Draw augmented views of an image from its seed, and compute the teacher's embeddings of them.

Views are random resized crops, half of them mirrored, as in TPT (arXiv:2209.07511, Sec. 4), MTA (arXiv:2405.02266) and
ZERO (arXiv:2405.18330); view 0 is the image itself. Crops are drawn as torchvision's `RandomResizedCrop` draws them:
area and logarithm of the aspect ratio uniform, ten tries, else the largest central box of an allowed ratio.

Legend: B images, F width of the teacher's embeddings.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageOps
from torch import Tensor

from ...teachers import Teacher
from .task import ImageBatch

_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Configure how views are drawn; the defaults are those of TPT and MTA.

    Args:
        scale: least and greatest share of the image's area.
        ratio: least and greatest width of a crop divided by its height.
        flip: probability of mirroring.

    Raises:
        ValueError: for a range that is empty or contains impossible values.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: expected 0 < least <= greatest <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio: expected 0 < least <= greatest, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip: expected a probability, got {self.flip}")


def make_view(
    image: PIL.Image.Image, view: int, *, seed: int, size: int, config: ViewConfig | None = None
) -> PIL.Image.Image:
    """Return view number `view` of an image; depends only on the arguments.

    Args:
        image: 8-bit RGB.
        view: 0 for the unchanged image; others are drawn.
        seed: seed of the image, not negative.
        size: side in pixels of the drawn views.
        config: how views are drawn.

    Raises:
        ValueError: for a negative number or seed.
    """
    if view < 0 or seed < 0 or size < 1:
        raise ValueError(f"view, seed, size: expected 0, 0 and 1 or more, got {view}, {seed} and {size}")
    if view == 0:
        return image
    config = config or ViewConfig()
    generator = np.random.default_rng((seed, view))
    box = _crop_box(generator, image.size, config)
    crop = image.resize((size, size), PIL.Image.Resampling.BICUBIC, box=box)
    return PIL.ImageOps.mirror(crop) if generator.random() < config.flip else crop


def view_encoder(teacher: Teacher, config: ViewConfig | None = None) -> Callable[[ImageBatch, int], Tensor]:
    """Return the `encode` function of an [`ImageBatch`]: batch and view number in, embeddings `(B, F)` out.

    View 0 goes through the teacher's image processor. Other views already have the teacher's size: they are rescaled
    and normalized as by that processor, but neither resized nor cropped again.
    """

    def encode(batch: ImageBatch, view: int) -> Tensor:
        if view == 0:
            output = teacher.encode_images(batch.images)
        else:
            crops = [
                make_view(image, view, seed=seed, size=teacher.image_size, config=config)
                for image, seed in zip(batch.images, batch.seeds, strict=True)
            ]
            inputs = teacher.image_processor(
                images=crops, do_resize=False, do_center_crop=False, do_pad=False, return_tensors="pt"
            )
            output = teacher.encode_images(pixel_values=inputs["pixel_values"])
        assert output.image_embeds is not None
        return output.image_embeds

    return encode


def _crop_box(
    generator: np.random.Generator, image_size: tuple[int, int], config: ViewConfig
) -> tuple[int, int, int, int]:
    """Draw a crop box (left, top, right, bottom); `image_size` is (width, height)."""
    width, height = image_size
    for _ in range(_TRIES):
        area = width * height * generator.uniform(*config.scale)
        ratio = math.exp(generator.uniform(*np.log(config.ratio)))
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            left = int(generator.integers(width - columns + 1))
            top = int(generator.integers(height - rows + 1))
            return left, top, left + columns, top + rows
    ratio = min(max(width / height, config.ratio[0]), config.ratio[1])
    columns, rows = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - columns) // 2, (height - rows) // 2
    return left, top, left + columns, top + rows
