"""Procedural part-whole scenes: cars with wheels, houses with roofs, and exact masks of wholes and parts.

Each scene shows one object, drawn from named parts, in a random pose on a random background, sometimes behind an
occluder. Colours are drawn per part and never per class: the class can only be read from shape and arrangement. Parts
that make wholes are what islands of agreement should reveal (GLOM, Hinton 2021, arXiv:2102.12627).

Shape legend: H, W image height and width in pixels (here both are image_size); S sub-pixels per pixel and axis.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

from .part_shapes import CLASS_NAMES, CLASS_PARTS, PART_NAMES, Shape, draw_object

if TYPE_CHECKING:
    import datasets

__all__ = ["CLASS_NAMES", "CLASS_PARTS", "PART_NAMES", "Scene", "SceneDataset", "make_scene"]

OCCLUSION_RATE = 0.35
MIN_VISIBLE = 0.65  # an occluder that would leave less of the object visible is left out
SUPERSAMPLING = 3  # S; odd, so that each pixel's centre is a sub-pixel and the masks are exact there
_INKED = 128  # added to a shape's number where its contour runs


@dataclass(frozen=True, eq=False)
class Scene:
    """An image and its annotation.

    Attributes:
        image: RGB, H x W.
        label: index into `CLASS_NAMES`.
        whole_mask: `(H, W)` uint8, 1 where the object is visible.
        part_mask: `(H, W)` uint8, index into `PART_NAMES` of what is visible at each pixel's centre.
    """

    image: Image.Image
    label: int
    whole_mask: NDArray[np.uint8]
    part_mask: NDArray[np.uint8]


def make_scene(index: int, *, seed: int = 0, image_size: int = 96) -> Scene:
    """Scene number `index` of the stream `seed`: the same on every computer, and at every size up to resampling.

    Args:
        index: which scene, >= 0; its class is `index % len(CLASS_NAMES)`, so any run of indices is balanced.
        seed: which stream, >= 0.
        image_size: H and W, in pixels, >= 16.
    """
    if index < 0 or seed < 0 or image_size < 16:
        raise ValueError(f"expected index >= 0, seed >= 0 and image_size >= 16, got {index}, {seed} and {image_size}")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
    label = index % len(CLASS_NAMES)
    shapes = _pose(draw_object(CLASS_NAMES[label], rng.uniform), rng)
    occluder = _occluder(shapes, rng)
    background = _background(image_size, rng)
    palette, light = _colours([*shapes, *occluder], rng), _light(image_size, rng)

    numbers = _rasterize(shapes, image_size * SUPERSAMPLING)
    if occluder:
        covered = _rasterize([*shapes, *occluder], image_size * SUPERSAMPLING)
        visible = (covered > 0) & (covered <= len(shapes))
        if np.count_nonzero(visible) >= MIN_VISIBLE * np.count_nonzero(numbers):
            numbers = covered
    centre = SUPERSAMPLING // 2
    part_of_number = np.zeros(256, dtype=np.uint8)
    for number, (part, _, _) in enumerate([*shapes, *occluder], start=1):
        part_of_number[number] = PART_NAMES.index(part)
    part_mask = part_of_number[numbers[centre::SUPERSAMPLING, centre::SUPERSAMPLING]]  # (H*S, W*S) -> (H, W)
    whole_mask = (part_mask > PART_NAMES.index("occluder")).astype(np.uint8)
    return Scene(_shade(numbers, palette, background, light), label, whole_mask, part_mask)


class SceneDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Scenes 0 to `num_scenes - 1` of one stream, drawn when asked for.

    Items are `{"image": PIL RGB, "label": int, "whole_mask": (H, W) uint8, "part_mask": (H, W) uint8}`.
    """

    def __init__(self, num_scenes: int, *, seed: int = 0, image_size: int = 96) -> None:
        if num_scenes < 1:
            raise ValueError(f"expected num_scenes >= 1, got {num_scenes}")
        self.num_scenes, self.seed, self.image_size = num_scenes, seed, image_size

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_scenes:
            raise IndexError(f"expected an index in 0..{self.num_scenes - 1}, got {index}")
        scene = make_scene(index, seed=self.seed, image_size=self.image_size)
        return {name: getattr(scene, name) for name in ("image", "label", "whole_mask", "part_mask")}

    def to_hf_dataset(self) -> "datasets.Dataset":
        """Return the rows as a `datasets.Dataset`; masks become greyscale images holding the same numbers."""
        from datasets import ClassLabel, Dataset, Features
        from datasets import Image as ImageFeature

        masks = ("whole_mask", "part_mask")
        rows = [self[index] for index in range(len(self))]
        rows = [{**row, **{name: Image.fromarray(row[name]) for name in masks}} for row in rows]
        features = {"image": ImageFeature(), "label": ClassLabel(names=list(CLASS_NAMES))}
        features |= {name: ImageFeature() for name in masks}
        return Dataset.from_list(rows, features=Features(features))


def _pose(shapes: list[Shape], rng: np.random.Generator) -> list[Shape]:
    """Turn, shear, stretch, mirror and place the object so that it lies inside the image, in [0, 1] x [0, 1]."""
    angle, shear, stretch = rng.uniform(-0.3, 0.3), rng.uniform(-0.18, 0.18), np.exp(rng.uniform(-0.16, 0.16))
    mirror = rng.choice([-1.0, 1.0])
    cos, sin = np.cos(angle), np.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.array([[mirror * stretch, shear], [0.0, 1 / stretch]])
    outlines = [outline @ linear.T for _, outline, _ in shapes]
    points = np.concatenate(outlines)
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    scale = rng.uniform(0.62, 0.94) / extent.max()
    corner = rng.uniform(0.02, 0.98 - scale * extent)
    return [
        (shape[0], (outline - low) * scale + corner, shape[2]) for shape, outline in zip(shapes, outlines, strict=True)
    ]


def _occluder(shapes: list[Shape], rng: np.random.Generator) -> list[Shape]:
    """Nothing, or one distractor (a bar, a disc or a shard) over some point of the object's bounding box."""
    points = np.concatenate([outline for _, outline, _ in shapes])
    centre = rng.uniform(points.min(axis=0), points.max(axis=0))
    turn, size, kind = rng.uniform(0, np.pi), rng.uniform(0.1, 0.17), rng.integers(3)
    if kind == 0:
        along, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)]) * size * 0.4
        outline = centre + np.stack([2 * along + across, 2 * along - across, -2 * along - across, across - 2 * along])
    else:
        count = 32 if kind == 1 else 5
        angles = turn + 2 * np.pi * np.arange(count) / count
        radii = size * (np.ones(count) if kind == 1 else rng.uniform(0.7, 1.4, count))
        outline = centre + np.stack([np.cos(angles), np.sin(angles)], axis=-1) * radii[:, None]
    return [("occluder", outline, 1.0)] if rng.random() < OCCLUSION_RATE else []


def _colours(shapes: list[Shape], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random colour per part, `(256, 3)` by shape number; hues are a golden-ratio walk, so that parts differ."""
    count = len(PART_NAMES)  # every part has its draws, shown or not, in a fixed order: none depends on the class
    hues = rng.random() + np.cumsum(0.618 + rng.uniform(-0.08, 0.08, count))
    colours = _rgb(hues, rng.uniform(0.35, 0.95, count), rng.uniform(0.5, 1.0, count))
    parts = [PART_NAMES.index(part) for part, _, _ in shapes]
    brightness = np.array([brightness for _, _, brightness in shapes])
    palette = np.zeros((256, 3))
    palette[1 : len(shapes) + 1] = np.minimum(colours[parts] * brightness[:, None], 1.0)
    palette[_INKED:] = palette[:_INKED] * rng.uniform(0.25, 0.6)
    return np.rint(palette * 255).astype(np.uint8)


def _rgb(hue: ArrayLike, saturation: ArrayLike, value: ArrayLike) -> NDArray[np.float64]:
    """HSV, hue in turns, to RGB in [0, 1]: `(...)` -> `(..., 3)`."""
    hue, saturation, value = (np.asarray(channel)[..., None] for channel in (hue, saturation, value))
    ramp = np.abs((hue + np.array([0.0, 2 / 3, 1 / 3])) % 1.0 * 6 - 3) - 1
    return value * (1 - saturation * (1 - np.clip(ramp, 0, 1)))


def _coordinates(image_size: int, angle: float) -> NDArray[np.float64]:
    """Position of every pixel centre along a direction, `(H, W)`, in [-0.71, 0.71]."""
    axis = (np.arange(image_size) + 0.5) / image_size - 0.5
    return np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]


def _clouds(image_size: int, cells: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Smooth random values, `(H, W)` in [0, 1]: a coarse random grid, enlarged."""
    grid = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(grid.resize((image_size, image_size), Image.Resampling.BICUBIC)) / 255.0


def _background(image_size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Two or three muted colours mixed by a pattern, `(H, W, 3)` in [0, 1]."""
    hue, value, angle = rng.random(), rng.uniform(0.3, 0.95), rng.uniform(0, 2 * np.pi)
    first = _rgb(hue, rng.uniform(0.05, 0.5), value)
    second = _rgb(
        hue + rng.uniform(-0.3, 0.3), rng.uniform(0.05, 0.5), np.clip(value + rng.choice([-0.25, 0.25]), 0.1, 1)
    )
    frequency, sharpness = 2 * np.pi * rng.uniform(3, 9), rng.uniform(0.5, 4)
    along, across = _coordinates(image_size, angle), _coordinates(image_size, angle + np.pi / 2)
    kind = rng.integers(6)
    if kind == 0:
        pattern = along / 1.42 + 0.5
    elif kind == 1:  # stripes
        pattern = 0.5 + sharpness * np.sin(frequency * along)
    elif kind == 2:  # dots
        pattern = 0.5 + sharpness * (np.sin(frequency * along) * np.sin(frequency * across) - 0.3)
    elif kind == 3:  # blobs
        pattern = 0.5 + 3 * sharpness * (_clouds(image_size, 6, rng) - 0.5)
    elif kind == 4:  # marble
        pattern = 0.5 + 0.5 * np.sin(frequency * (along + 0.3 * _clouds(image_size, 5, rng)))
    else:  # grain
        pattern = (
            0.4 * _clouds(image_size, 48, rng) + 0.3 * _clouds(image_size, 16, rng) + 0.3 * _clouds(image_size, 5, rng)
        )
    pattern = np.clip(pattern, 0, 1)[..., None]
    vignette = 1 + rng.uniform(0, 0.25) * _coordinates(image_size, rng.uniform(0, 2 * np.pi))[..., None]
    return (first + (second - first) * pattern) * vignette


def _light(image_size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How brightly each pixel of the object is lit, `(H, W)` around 1: one lamp and a faint mottle."""
    lamp = rng.uniform(0.1, 0.4) * _coordinates(image_size, rng.uniform(0, 2 * np.pi))
    return 1 + lamp + 0.2 * (_clouds(image_size, 12, rng) - 0.5)


def _rasterize(shapes: list[Shape], size: int) -> NDArray[np.uint8]:
    """Return the number of the shape that is visible at each pixel, `(size, size)` uint8: from 1, or 0 for none."""
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    for number, (part, outline, _) in enumerate(shapes, start=1):
        draw.polygon((outline * size - 0.5).ravel().tolist(), fill=0 if part == "background" else number)
    return np.asarray(canvas)


def _shade(
    numbers: NDArray[np.uint8],
    palette: NDArray[np.uint8],
    background: NDArray[np.float64],
    light: NDArray[np.float64],
) -> Image.Image:
    """Colour the shapes, draw their contours, cast a soft shadow and blend with the background, anti-aliased."""
    image_size = len(light)
    reach = max(1, round(image_size * SUPERSAMPLING / 190))
    edge = np.zeros(numbers.shape, dtype=bool)
    edge[reach:-reach] |= numbers[2 * reach :] != numbers[: -2 * reach]
    edge[:, reach:-reach] |= numbers[:, 2 * reach :] != numbers[:, : -2 * reach]
    inked = Image.fromarray(numbers + np.uint8(_INKED) * (edge & (numbers > 0)))
    alpha = inked.point([0] + [255] * 255).reduce(SUPERSAMPLING)
    inked.putpalette(palette.tobytes())  # black where there is no shape: the mean below is premultiplied by alpha
    colour = np.asarray(inked.convert("RGB").reduce(SUPERSAMPLING)) / 255.0
    shadow = Image.new("L", alpha.size)
    shadow.paste(alpha, (image_size // 48, image_size // 32))
    shadow = shadow.filter(ImageFilter.BoxBlur(image_size / 40))
    ground = background * (1 - 0.4 / 255 * np.asarray(shadow)[..., None])
    blended = colour * light[..., None] + ground * (1 - np.asarray(alpha)[..., None] / 255)
    return Image.fromarray(np.rint(np.clip(blended, 0, 1) * 255).astype(np.uint8))
