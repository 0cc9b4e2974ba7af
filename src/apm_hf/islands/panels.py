"""Draw panels of a figure: photos, maps with colour bars, regions drawn over a photo.

Sizes are computed in inches, so that panels are close together and the font size is the same in every figure.

Legend: (rows, cols) a map of locations, row-major; coordinates are (y, x) in [-1, 1].
"""

import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..ttt.photos import map_size
from .figures import new_figure, place

DPI = 130
_PANEL = 2.5  # inches, the side of a square panel
_NARROWEST, _LONGEST = 1.9, 8.0  # inches: the width of a title; the longer side of extreme shapes
_FONT, _CHARACTER, _LINE, _GAP, _BAR = 14, 0.105, 0.23, 0.08, 0.55  # points; inches
_REGIONS_SIZE = 640  # longer side of drawn regions in pixels


@dataclass(frozen=True)
class Panel:
    """Describe one panel of a figure.

    Args:
        title: title above the panel.
        picture: `(height, width, 3)`, uint8 or in [0, 1]; or values `(height, width)`, with a colour bar.
        unit: text below the colour bar.
        colormap: colormap of values.
        point: (y, x) in [-1, 1], marked.
        smooth: False draws cells without interpolation.
    """

    title: str
    picture: np.ndarray
    unit: str = ""
    colormap: str = "viridis"
    point: tuple[float, float] | None = None
    smooth: bool = True


def draw_panels(rows: list[list[Panel]], aspect: float, caption: str = "", *, dpi: int = DPI) -> Any:
    """Draw rows of panels of one shape (height / width), as wide as the longest first row."""
    columns = len(rows[0])
    lines = [row[start : start + columns] for row in rows for start in range(0, len(row), columns)]
    width, height = _panel_size(aspect)
    titles = [[textwrap.fill(panel.title, int(width / _CHARACTER)) for panel in line] for line in lines]
    title_heights = [0.12 + _LINE * max(title.count("\n") + 1 for title in line) for line in titles]
    bar_heights = [_BAR if any(panel.picture.ndim == 2 for panel in line) else 0.0 for line in lines]
    total_height = sum(title_heights) + sum(bar_heights) + len(lines) * height + (0.35 if caption else _GAP)
    figure = new_figure(columns * (width + _GAP) + _GAP, total_height, dpi=dpi)
    top = 0.0
    for line, names, title_height, bar_height in zip(lines, titles, title_heights, bar_heights, strict=True):
        top += title_height
        for column, (panel, name) in enumerate(zip(line, names, strict=True)):
            left = _GAP + column * (width + _GAP)
            axes = place(figure, left, top, width, height)
            image = _draw(panel, axes, name)
            if panel.picture.ndim == 2:
                bar = place(figure, left + 0.1, top + height + 0.07, width - 0.2, 0.09)
                figure.colorbar(image, cax=bar, orientation="horizontal")
                bar.locator_params(nbins=4)
                bar.tick_params(labelsize=11)
                bar.set_xlabel(panel.unit, fontsize=12)
        top += height + bar_height
    if caption:
        figure.text(0.5, 0.1 / total_height, caption, fontsize=11, color="0.35", ha="center")
    return figure


def _panel_size(aspect: float) -> tuple[float, float]:
    """Return width and height in inches: equal areas for usual shapes; extreme ones are squeezed."""
    width = min(max(_PANEL / aspect**0.5, _NARROWEST), _LONGEST)
    return width, min(max(width * aspect, 0.5), _LONGEST)


def _draw(panel: Panel, axes: Any, title: str) -> Any:
    image = axes.imshow(
        panel.picture,
        aspect="auto",
        extent=(-1, 1, 1, -1),
        interpolation="bilinear" if panel.smooth else "nearest",
        cmap=panel.colormap,
    )
    axes.set_title(title, fontsize=_FONT)
    if panel.point is not None:
        y, x = panel.point
        axes.plot(x, y, marker="+", markersize=17, markeredgewidth=4.5, color="black", clip_on=False)
        axes.plot(x, y, marker="+", markersize=15, markeredgewidth=2, color="white", clip_on=False)
    return image


def draw_regions(picture: np.ndarray, labels: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """Draw regions over a dimmed photo: tinted, with light contours.

    Args:
        picture: `(H, W, 3)`, uint8.
        labels: `(rows, cols)`.
        fill: `(rows, cols, 3)` in [0, 1], one colour per region.

    Returns:
        `(H', W', 3)` in [0, 1], with a longer side of 640 pixels.
    """
    height, width = map_size(Image.fromarray(picture), _REGIONS_SIZE)
    photo = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)) / 255
    ids, first = np.unique(labels, return_index=True)
    shares = torch.from_numpy(labels[None] == ids[:, None, None]).float()  # (K, rows, cols)
    shares = F.avg_pool2d(F.avg_pool2d(shares, 2, 1, padding=1), 2, 1)  # round off the cells' corners
    finest = F.interpolate(shares[None], (height, width), mode="bicubic")[0].argmax(dim=0).numpy()  # (H', W')
    grey = photo @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    drawn = 0.35 * grey[..., None] + 0.65 * fill.reshape(-1, 3)[first][finest]
    drawn[_contours(finest, 2)] = 1.0
    return drawn


def _contours(labels: np.ndarray, radius: int) -> np.ndarray:
    """Return `(H, W)` bool: pixels with another region within `radius` pixels."""
    edge = np.zeros(labels.shape, dtype=bool)
    for shift in range(1, radius + 1):
        across, down = labels[:, shift:] != labels[:, :-shift], labels[shift:] != labels[:-shift]
        edge[:, shift:] |= across
        edge[shift:] |= down
    return edge
