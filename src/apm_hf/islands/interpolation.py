"""Interpolate between two images: blend their trigger columns and query the model with the blends.

Source: arXiv:2410.20535, which shows features and colours between the trigger columns of two images.

The fold is linear in the pixels, so the linear blend of two columns is exactly the column of the cross-faded image. A
model with the local patch in its query (`local_patch=True`) takes patches from an image as well: by default they are
those of the cross-faded image, and linear blending then equals querying that image. Only a model without the local
patch, or one with the patches of one image, shows what information the column alone carries.

Legend: C channels, D trigger width, S image side, T frames, F feature width, (rows, cols) a map of locations,
row-major.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ttt.maps import bare_model
from ..ttt.photos import query_map

BLENDINGS = ("linear", "spherical")
PATCHES = ("blend", "a", "b")


@dataclass(frozen=True)
class InterpolationFrame:
    """Hold the model's outputs at one blend.

    Args:
        alpha: share of the second image, 0 to 1.
        features: `(rows, cols, F)`.
        rgb: `(rows, cols, 3)`, in [0, 1], or None without an RGB head.
    """

    alpha: float
    features: Tensor
    rgb: Tensor | None


def blend(first: Tensor, second: Tensor, alpha: float, *, blending: str = "linear") -> Tensor:
    """Interpolate between two batches of vectors `(..., D)`: the first at `alpha` 0, the second at 1.

    Args:
        blending: `"linear"`, or `"spherical"` (Shoemake, SIGGRAPH 1985): directions turn evenly along the great
            circle, and lengths change evenly. Directions that are equal, opposite or undefined do not define a
            circle; they are blended linearly.

    Raises:
        ValueError: for shapes that differ, or an unknown blending.
    """
    if first.shape != second.shape:
        raise ValueError(f"second: expected shape {tuple(first.shape)}, as the first's, got {tuple(second.shape)}")
    if blending not in BLENDINGS:
        raise ValueError(f"blending: expected one of {list(BLENDINGS)}, got {blending!r}")
    linear = (1 - alpha) * first + alpha * second
    if blending == "linear":
        return linear
    cosine = F.cosine_similarity(first, second, dim=-1)[..., None].clamp(-1, 1)
    angle, sine = cosine.acos(), (1 - cosine.square()).sqrt()
    lengths = [vectors.norm(dim=-1, keepdim=True) for vectors in (first, second)]
    direction = ((1 - alpha) * angle).sin() * F.normalize(first, dim=-1)
    direction = direction + (alpha * angle).sin() * F.normalize(second, dim=-1)
    spherical = direction / sine.clamp_min(1e-12) * (lengths[0] + alpha * (lengths[1] - lengths[0]))
    undefined = (sine < 1e-3) | (lengths[0] == 0) | (lengths[1] == 0)
    return torch.where(undefined, linear, spherical)


def interpolate(
    model: nn.Module,
    pixel_values_a: Tensor | None,
    pixel_values_b: Tensor | None,
    steps: int,
    size: tuple[int, int] | None = None,
    *,
    blending: str = "linear",
    patches: str = "blend",
    trigger_columns: tuple[Tensor, Tensor] | None = None,
) -> Iterator[InterpolationFrame]:
    """Query a model with `steps` evenly spaced blends of two images, ends included, one at a time.

    Frames are computed lazily, so that many large ones need not be held in memory.

    Args:
        steps: T, at least 2.
        model, pixel_values_a, pixel_values_b, size, blending, patches, trigger_columns: as in [`frame_between`].

    Raises:
        ValueError: for fewer than 2 steps, and as in [`frame_between`].
    """
    if steps < 2:
        raise ValueError(f"steps: expected at least 2, the two images, got {steps}")
    frame = frame_between(
        model,
        pixel_values_a,
        pixel_values_b,
        size,
        blending=blending,
        patches=patches,
        trigger_columns=trigger_columns,
    )
    return (frame(index / (steps - 1)) for index in range(steps))


def frame_between(
    model: nn.Module,
    pixel_values_a: Tensor | None,
    pixel_values_b: Tensor | None,
    size: tuple[int, int] | None = None,
    *,
    blending: str = "linear",
    patches: str = "blend",
    trigger_columns: tuple[Tensor, Tensor] | None = None,
) -> Callable[[float], InterpolationFrame]:
    """Return a function of alpha (0 is the first image, 1 the second) that queries the model at that blend.

    Args:
        model: an [`APMModel`] or a model that contains one.
        pixel_values_a, pixel_values_b: `(1, C, S, S)`; None if the columns are given and the model has no local
            patch.
        size: `(rows, cols)` of the maps; None is the model's grid.
        blending: blending of the columns, `"linear"` or `"spherical"`, see [`blend`].
        patches: with `local_patch=True`, the patches in the queries: those of the cross-faded image (`"blend"`:
            pixel values are blended linearly) or always those of one image (`"a"`, `"b"`).
        trigger_columns: `(1, D)` each, instead of folding; required with `trigger_source="embedding"`. With
            `trigger_source="tokens"` they are the teacher's tokens, `(1, rows, cols, F)`: a blend of these is not what
            the teacher would output for the cross-faded image.

    Raises:
        ValueError: for unknown options, or shapes that do not fit the model.
    """
    apm = bare_model(model)
    if patches not in PATCHES:
        raise ValueError(f"patches: expected one of {list(PATCHES)}, got {patches!r}")
    if trigger_columns is None:
        if pixel_values_a is None or pixel_values_b is None:
            raise ValueError("interpolate: expected two images or trigger_columns, got neither")
        with torch.no_grad():
            trigger_columns = apm.fold(pixel_values_a), apm.fold(pixel_values_b)
    first, second = trigger_columns
    blend(first, second, 0.0, blending=blending)  # raises before the first frame is requested
    pixels = None
    if apm.config.local_patch:
        if pixel_values_a is None or pixel_values_b is None:
            raise ValueError("interpolate: expected two images, since local_patch=True puts patches into the query")
        pixels = {"blend": (pixel_values_a, pixel_values_b), "a": (pixel_values_a,) * 2, "b": (pixel_values_b,) * 2}
    shape = size or (apm.config.grid_size, apm.config.grid_size)
    if min(shape) < 1:
        raise ValueError(f"size: expected a positive (rows, cols), got {size}")

    def frame(alpha: float) -> InterpolationFrame:
        column = blend(first, second, alpha, blending=blending)
        pixel_values = None if pixels is None else blend(*pixels[patches], alpha)
        features, rgb = query_map(apm, pixel_values, shape, trigger_column=column)
        return InterpolationFrame(alpha, features[0], None if rgb is None else rgb[0])

    return frame
