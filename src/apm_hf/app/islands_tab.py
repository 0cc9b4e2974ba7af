"""A photo -> islands at three heights, what they are made of, controls; a point in it -> what is similar to it.

Source: the islands are GLOM's (arXiv:2102.12627); an APM's, arXiv:2410.20535, section 4.

Legend: F feature width, (rows, cols) a map of locations, row-major; coordinates are (y, x) in [-1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..islands.colours import PCAColours
from ..islands.figures import load_matplotlib
from ..islands.panels import draw_regions
from ..islands.similarity import similarity_map
from ..islands.tree import RegionTree, tree_colours
from ..ttt.maps import query, upsample
from ..ttt.photos import map_size, query_map, teacher_features
from .models import AppModels
from .pictures import Picture, from_colours

HEIGHTS = (2, 6, 20)  # regions: wholes, parts, sub-parts
_NAMES = ("wholes", "parts", "sub-parts")
_NOTES = ("that differ most", "each within a whole", "each within a part")
_CONTROL = "of an APM with random weights"
_TREE_SIZE = 64  # locations along the longer side of the maps that trees are fitted to, at most


@dataclass(frozen=True, eq=False)
class PhotoFeatures:
    """Hold a photo and the features of its locations.

    Args:
        photo: 8-bit RGB.
        pixel_values: `(1, C, S, S)`, the input of the model.
        trigger_column: `(1, D)` or tokens `(1, rows, cols, F)`, where the model takes them from its teacher.
        features: `(rows, cols, F)` in half precision, since those of many visitors are held at a time.
        rgb: `(rows, cols, 3)` in [0, 1], or None without RGB head.
        control: `(rows, cols, F)` of fewer locations, of an APM with random weights.
        trees: of the model's features, and of the control's; any numbers of regions are cuts of them.
    """

    photo: Image.Image
    pixel_values: Tensor
    trigger_column: Tensor | None
    features: Tensor
    rgb: Tensor | None
    control: Tensor
    trees: tuple[RegionTree, RegionTree]

    @property
    def num_bytes(self) -> int:
        """Bytes of the photo, as RGB, of all tensors, and of the trees."""
        tensors = (self.pixel_values, self.trigger_column, self.features, self.rgb, self.control)
        trees = sum(4 * tree.merge_heights.nbytes for tree in self.trees)
        return 3 * self.photo.width * self.photo.height + sum(t.nbytes for t in tensors if t is not None) + trees


def photo_features(models: AppModels, photo: Image.Image, *, size: int = 128) -> PhotoFeatures:
    """Query the features of a photo at `size` locations along its longer side."""
    pixel_values, column = models.apm.pixel_values([photo]), models.apm.trigger_column([photo])
    features, rgb = query_map(models.model, pixel_values, map_size(photo, size), trigger_column=column)
    coarse, control = (
        query_map(model, pixel_values, map_size(photo, min(_TREE_SIZE, size)), trigger_column=column)[0][0]
        for model in (models.model, models.control)
    )
    trees = RegionTree.fit(coarse), RegionTree.fit(control)
    colours = None if rgb is None else rgb[0]
    return PhotoFeatures(photo, pixel_values, column, features[0].half(), colours, control.half(), trees)


def island_pictures(seen: PhotoFeatures, heights: Sequence[int] = HEIGHTS) -> list[Picture]:
    """Islands at three heights, with their control.

    Raises:
        ValueError: for numbers of regions that do not ascend, or more than locations.
    """
    if min(heights) < 1 or list(heights) != sorted(set(heights)):
        raise ValueError("Wholes, parts and sub-parts: please give three numbers of regions, each above the last.")
    tree, control = seen.trees
    if heights[-1] > tree.shape[0] * tree.shape[1]:
        raise ValueError(f"{heights[-1]} regions are too many for this photo: please ask for fewer.")
    cuts, control_cut = tree.cuts(heights), control.cut(heights[1])
    drawn = [
        from_colours(draw_regions(np.asarray(seen.photo), cut, fill), seen.photo)
        for cut, fill in zip([*cuts, control_cut], [*tree_colours(cuts), *tree_colours([control_cut])], strict=True)
    ]
    islands = [
        Picture(f"{height} {name}", image, note)
        for height, name, image, note in zip(heights, _NAMES, drawn[:-1], _NOTES, strict=True)
    ]
    return [*islands, Picture(f"Control: {heights[1]} parts", drawn[-1], _CONTROL, is_control=True)]


def made_of_pictures(models: AppModels, seen: PhotoFeatures) -> list[Picture]:
    """Draw what islands are made of: features, the teacher's beside them, colours, and a control."""
    features = seen.features.float()
    colours = PCAColours.fit(features)
    shown = {"Features": (colours(features), "of the APM, three principal components")}
    if models.teacher is not None:
        grid = teacher_features(models.teacher, [seen.photo], fine=False)[0]
        note = f"its {len(grid)} × {grid.shape[1]} features, in the same colours"
        shown["Teacher"] = colours(upsample(grid, (seen.features.shape[0], seen.features.shape[1]))), note
    if seen.rgb is not None:
        shown["RGB decoded"] = seen.rgb.float().cpu().numpy(), "the photo as the APM holds it"
    # Colours of its own, in which a control shows the most.
    shown["Control: features"] = PCAColours.fit(seen.control.float())(seen.control.float()), _CONTROL
    return [
        Picture(title, from_colours(picture, seen.photo), note, is_control=note == _CONTROL)
        for title, (picture, note) in shown.items()
    ]


def similarity_picture(models: AppModels, seen: PhotoFeatures, point: tuple[float, float]) -> Picture:
    """Draw how similar the features of every location are to those at a point (y, x) in [-1, 1].

    Raises:
        ValueError: for a point outside of the photo.
    """
    y, x = point
    if max(abs(y), abs(x)) > 1:
        raise ValueError("The point lies outside of the photo: y and x go from -1 to 1.")
    where = torch.tensor([[y, x]])
    there = query(models.model, seen.pixel_values, where, trigger_column=seen.trigger_column).last_hidden_state
    assert there is not None
    similar = similarity_map(seen.features[None], there)[0, 0].cpu().numpy()
    low, high = float(similar.min()), float(similar.max())
    colours = load_matplotlib()[0].colormaps["viridis"]((similar - low) / max(high - low, 1e-6))[..., :3]
    return Picture(
        "Like the point",
        _marked(from_colours(colours, seen.photo), y, x),
        f"at y {y:.2f}, x {x:.2f}: cosines from {low:.2f}, dark, to {high:.2f}, bright",
    )


def _marked(image: Image.Image, y: float, x: float) -> Image.Image:
    """Mark a point of a picture with a cross that is seen on any ground."""
    column, row = (x + 1) / 2 * image.width, (y + 1) / 2 * image.height
    draw = ImageDraw.Draw(image)
    for width, length, colour in ((7, 13, "black"), (3, 11, "white")):
        draw.line([(column - length, row), (column + length, row)], fill=colour, width=width)
        draw.line([(column, row - length), (column, row + length)], fill=colour, width=width)
    return image


def point_of_pixel(x: float, y: float, size: tuple[int, int]) -> tuple[float, float]:
    """(y, x) in [-1, 1] of the centre of a pixel of a picture of `size` (width, height)."""
    width, height = size
    return 2 * (y + 0.5) / height - 1, 2 * (x + 0.5) / width - 1
