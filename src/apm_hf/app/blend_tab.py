"""Two photos -> the model's outputs at any place between them: their trigger columns, or tokens, are blended.

Source: arXiv:2410.20535; what a blend is, and is not, stands in `islands/interpolation.py`.

Legend: (rows, cols) a map of locations, row-major.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

from ..islands.colours import PCAColours
from ..islands.interpolation import InterpolationFrame, frame_between
from ..ttt.photos import map_size
from .models import AppModels
from .pictures import Picture, from_colours

_SIZE = 96  # locations along the longer side
_FITTED = (0.0, 0.25, 0.5, 0.75, 1.0)  # places whose features the colours are fitted to


@dataclass(frozen=True, eq=False)
class Blend:
    """Hold the way between two photos.

    Args:
        photo: the first one, in whose shape all is shown.
        frame: the outputs at alpha, from 0, the first photo, to 1, the second.
        colours: of features; the same everywhere on the way, so that they compare.
        num_bytes: of the photo, of both pixel values and of both trigger columns.
    """

    photo: Image.Image
    frame: Callable[[float], InterpolationFrame]
    colours: PCAColours
    num_bytes: int


def blend(models: AppModels, first: Image.Image, second: Image.Image, *, patches: str = "blend") -> Blend:
    """Take the way between two photos; the second is squeezed into the first one's shape.

    Args:
        patches: of a model that sees the pixels around each location: those of both photos, cross-faded
            (`"blend"`), or of one (`"a"`, `"b"`).
    """
    photos, model = [first, second], models.model
    pixel_values, columns = models.apm.pixel_values(photos), models.apm.trigger_column(photos)
    ends = None if columns is None else (columns[:1], columns[1:])
    images = pixel_values[:1], pixel_values[1:]
    frame = frame_between(model, *images, map_size(first, _SIZE), patches=patches, trigger_columns=ends)
    grid = frame_between(model, *images, patches=patches, trigger_columns=ends)
    colours = PCAColours.fit(torch.stack([grid(alpha).features for alpha in _FITTED]))
    num_bytes = 3 * first.width * first.height + pixel_values.nbytes + (0 if columns is None else columns.nbytes)
    return Blend(first, frame, colours, num_bytes)


def blend_pictures(taken: Blend, alpha: float) -> list[Picture]:
    """Colours decoded, where the model decodes them, and features at one place on the way.

    Raises:
        ValueError: for a share outside of 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError("The share of photo B lies between 0 and 1.")
    frame = taken.frame(alpha)
    share = f"{100 * alpha:.0f} % of photo B"
    features = Picture(
        "Features", from_colours(taken.colours(frame.features), taken.photo), f"at {share}, principal components"
    )
    if frame.rgb is None:
        return [features]
    decoded = from_colours(frame.rgb.float().cpu().numpy(), taken.photo)
    return [Picture("RGB decoded", decoded, f"at {share}"), features]
