"""Draw the interpolation between two photos as a strip, a GIF and an MP4: decoded colours, features, and alpha.

Legend: T frames, (rows, cols) a map of locations, row-major.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils.logging import tqdm

from ..modeling_apm import APMModel
from ..runs.files import write_atomically
from .colours import PCAColours
from .figures import figure_pixels, new_figure, place, png_bytes
from .films import write_movies
from .interpolation import BLENDINGS, PATCHES, InterpolationFrame, interpolate

_STRIP_COLUMNS = 7  # columns of model outputs, between the two photos
_DPI, _FONT = 110, 14


@dataclass(frozen=True, kw_only=True)
class InterpolationConfig:
    """Configure how the interpolation between two photos is drawn.

    Args:
        steps: T, number of frames of the movie, ends included.
        size: locations along the longer side of a map.
        blending: blending of the trigger columns, `"linear"` or `"spherical"`.
        patches: patches for a model with local patch: `"blend"`, `"a"` or `"b"`.
        fps: frames per second of the movie.

    Raises:
        ValueError: for a value outside its range.
    """

    steps: int = 25
    size: int = 192
    blending: str = "linear"
    patches: str = "blend"
    fps: float = 10.0

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps: expected at least 2, the two photos, got {self.steps}")
        if self.size < 8:
            raise ValueError(f"size: expected at least 8 locations along the longer side, got {self.size}")
        for name, known in (("blending", BLENDINGS), ("patches", PATCHES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {list(known)}, got {getattr(self, name)!r}")
        if not 0 < self.fps <= 50:
            raise ValueError(f"fps: expected more than 0 and at most 50 frames per second, got {self.fps}")


def interpolation_picture(
    photos: tuple[Image.Image, Image.Image],
    output_dir: Path,
    model: APMModel,
    pixel_values: Tensor,
    size: tuple[int, int],
    *,
    config: InterpolationConfig,
    trigger_columns: tuple[Tensor, Tensor] | None = None,
    caption: str = "",
) -> list[Path]:
    """Write `interpolation.png` (a strip), `interpolation.gif` and, if OpenCV is installed, `interpolation.mp4`.

    All frames share one set of principal components, so colours are comparable. The movie plays forth and back.

    Args:
        photos: shown at the ends of the strip.
        model: the model to query.
        pixel_values: `(2, C, S, S)`, the photos as model inputs.
        size: `(rows, cols)` of the maps.
        trigger_columns: `(1, D)` each, for `trigger_source="embedding"`, or tokens `(1, rows, cols, F)`.
        caption: text below the strip.

    Returns:
        The files written.
    """

    def frames(steps: int, size: tuple[int, int] | None) -> Iterator[InterpolationFrame]:
        return interpolate(
            model,
            pixel_values[:1],
            pixel_values[1:],
            steps,
            size,
            blending=config.blending,
            patches=config.patches,
            trigger_columns=trigger_columns,
        )

    # Directions are fitted on the model's grid, so that large maps need not be held in memory.
    colours = PCAColours.fit(torch.stack([frame.features.cpu() for frame in frames(_STRIP_COLUMNS, None)]))
    drawn = [
        _Colours.of(frame, colours) for frame in tqdm(frames(config.steps, size), desc="blend", total=config.steps)
    ]
    strip = output_dir / "interpolation.png"
    blended = "the teacher's tokens" if model.config.trigger_source == "tokens" else "the trigger column"
    write_atomically(strip, png_bytes(_strip(photos, drawn, size, caption, blended)))
    forward = _movie_frames(drawn, size)
    hold = round(config.fps * 0.8)
    movie = [*forward[:1] * hold, *forward, *forward[-1:] * hold, *forward[-2:0:-1]]
    return [strip, *write_movies(output_dir, "interpolation", np.stack(movie), config.fps)]


@dataclass(frozen=True)
class _Colours:
    """Hold a drawn frame: panels `(rows, cols, 3)` in [0, 1] by title."""

    alpha: float
    panels: dict[str, np.ndarray]

    @classmethod
    def of(cls, frame: InterpolationFrame, colours: Callable[[Tensor], np.ndarray]) -> "_Colours":
        panels = {} if frame.rgb is None else {"RGB decoded": frame.rgb.float().cpu().numpy()}
        return cls(frame.alpha, panels | {"features (PCA)": colours(frame.features)})


def _strip(
    photos: tuple[Image.Image, Image.Image], drawn: list[_Colours], size: tuple[int, int], caption: str, blended: str
) -> Any:
    chosen = sorted({round(i * (len(drawn) - 1) / (_STRIP_COLUMNS - 1)) for i in range(_STRIP_COLUMNS)})
    shown = [drawn[index] for index in chosen]
    titles, aspect = list(shown[0].panels), size[0] / size[1]
    width, height, gap, margin = 2.0 / aspect**0.5, 2.0 * aspect**0.5, 0.08, 0.35
    left = width + 2 * gap + margin  # left edge of the model's outputs
    right = left + len(shown) * (width + gap)
    top = gap if len(titles) > 1 else 0.35  # beside one row there is no room above the photos for their names
    bottom = top + len(titles) * (height + gap)
    total_height = bottom + (0.95 if caption else 0.7)
    figure = new_figure(right + width + gap, total_height, dpi=_DPI)
    for place_x, photo, name in ((gap, photos[0], "A"), (right, photos[1], "B")):
        axes = place(figure, place_x, top + (bottom - top - gap - height) / 2, width, height)
        axes.imshow(np.asarray(photo.convert("RGB")), aspect="auto", interpolation="lanczos")
        axes.set_title(f"photo {name}", fontsize=_FONT)
    for row, title in enumerate(titles):
        for column, frame in enumerate(shown):
            axes = place(figure, left + column * (width + gap), top + row * (height + gap), width, height)
            axes.imshow(frame.panels[title], aspect="auto", interpolation="bilinear")
            if column == 0:
                axes.set_ylabel(title, fontsize=_FONT)
    axes = place(figure, left, bottom, right - left - gap, 0.02)
    step = 1 / (len(shown) - 1)
    share = width / (width + gap) / 2  # so that ticks are centred under the columns
    axes.set(xlim=(-share * step, 1 + share * step), xticks=[column * step for column in range(len(shown))])
    axes.set_xticklabels([f"{frame.alpha:.2f}" for frame in shown], fontsize=_FONT)
    axes.set_xlabel(rf"$\alpha$: share of photo B in {blended}", fontsize=_FONT)
    axes.spines[["top", "left", "right"]].set_visible(False)
    if caption:
        figure.text(0.5, 0.06 / total_height, caption, fontsize=10, color="0.35", ha="center")
    return figure


def _movie_frames(drawn: list[_Colours], size: tuple[int, int]) -> list[np.ndarray]:
    """Return one `(H, W, 3)` per frame: panels side by side, and a marker of alpha between A and B."""
    titles, aspect = list(drawn[0].panels), size[0] / size[1]
    width, height, gap = 3.0 / aspect**0.5, 3.0 * aspect**0.5, 0.08
    total_width = len(titles) * (width + gap) + gap
    figure = new_figure(total_width, height + 0.95, dpi=_DPI)
    images = []
    for column, title in enumerate(titles):
        axes = place(figure, gap + column * (width + gap), 0.35, width, height)
        images.append(axes.imshow(drawn[0].panels[title], aspect="auto", interpolation="bilinear"))
        axes.set_title(title, fontsize=_FONT)
    axes = place(figure, 0.25, height + 0.55, total_width - 0.5, 0.02)
    axes.set(xlim=(0, 1), ylim=(-1, 1), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_xticklabels(["A", "0.25", "0.5", "0.75", "B"], fontsize=_FONT)
    axes.spines[["top", "left", "right"]].set_visible(False)
    (marker,) = axes.plot([0], [0], marker="o", markersize=10, color="#D55E00", clip_on=False)
    frames = []
    for frame in drawn:
        for image, title in zip(images, titles, strict=True):
            image.set_data(frame.panels[title])
        marker.set_xdata([frame.alpha])
        frames.append(figure_pixels(figure))
    return frames
