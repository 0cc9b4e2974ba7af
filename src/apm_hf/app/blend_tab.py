"""Two photos -> what the machine sees at any place between them: their trigger columns are blended.

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
from .models import Machines
from .pictures import Picture, from_colours

_SIZE = 96  # locations along the longer side
_FITTED = (0.0, 0.25, 0.5, 0.75, 1.0)  # places whose features the colours are fitted to


@dataclass(frozen=True, eq=False)
class Pair:
    """Two photos and the way between them.

    Args:
        photo: the first one, in whose shape all is shown.
        frame: what the machine sees at alpha, from 0, the first photo, to 1, the second.
        colours: of features; the same everywhere on the way, so that they compare.
    """

    photo: Image.Image
    frame: Callable[[float], InterpolationFrame]
    colours: PCAColours


def pair(machines: Machines, first: Image.Image, second: Image.Image, *, patches: str = "blend") -> Pair:
    """Show the machine two photos; the second is squeezed into the first one's shape.

    Args:
        patches: of a machine that sees the pixels around each location: those of both photos, cross-faded
            (`"blend"`), or of one (`"a"`, `"b"`).
    """
    photos, model = [first, second], machines.model
    pixel_values, columns = machines.machine.pixel_values(photos), machines.machine.trigger_column(photos)
    ends = None if columns is None else (columns[:1], columns[1:])
    images = pixel_values[:1], pixel_values[1:]
    frame = frame_between(model, *images, map_size(first, _SIZE), patches=patches, trigger_columns=ends)
    grid = frame_between(model, *images, patches=patches, trigger_columns=ends)
    return Pair(first, frame, PCAColours.fit(torch.stack([grid(alpha).features for alpha in _FITTED])))


def blend_pictures(pair: Pair, alpha: float) -> list[Picture]:
    """Colours decoded, where the machine decodes them, and features at one place on the way.

    Raises:
        ValueError: for a share outside of 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError("The share of photo B lies between 0 and 1.")
    frame = pair.frame(alpha)
    share = f"{100 * alpha:.0f} % of photo B"
    features = Picture(
        "Features", from_colours(pair.colours(frame.features), pair.photo), f"at {share}, principal components"
    )
    if frame.rgb is None:
        return [features]
    decoded = from_colours(frame.rgb.float().cpu().numpy(), pair.photo)
    return [Picture("RGB decoded", decoded, f"at {share}"), features]
