"""Film the islands of a photo while a model is fitted to it: wholes split into parts.

Source: islands are from GLOM (arXiv:2102.12627); the fit is test-time training (arXiv:2410.20535, section 4).

Legend: F feature width, (rows, cols) a map of locations, row-major.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..modeling_apm import APMModel
from ..ttt.photos import map_size, query_map
from .colours import PCAColours
from .figures import figure_pixels
from .films import write_movies
from .panels import Panel, draw_panels, draw_regions
from .pictures import IslandsConfig
from .tree import RegionTree

_SIZE, _TREE_SIZE = 128, 64  # locations along the longer side, at most
_NUM_FRAMES = 24
_DPI = 80


class IslandsMovie:
    """Record a fit and draw wholes splitting into parts.

    Every frame's tree is cut at the distances at which the last frame's tree has the requested numbers of regions. A
    model with equal features everywhere thus shows one region, which splits as features diverge. Colours are the
    principal components of the teacher's features, the same in all frames.

    Args:
        photo: the original photo.
        pixel_values: `(1, C, S, S)`, the model's input.
        teacher_features: `(rows, cols, F)`, targets of the fit.
        steps: number of steps of the fit.
        config: gives heights, and the size up to 128.
        trigger_column: `(1, D)`, for `trigger_source="embedding"`.
    """

    def __init__(
        self,
        photo: Image.Image,
        pixel_values: Tensor,
        teacher_features: Tensor,
        steps: int,
        *,
        config: IslandsConfig,
        trigger_column: Tensor | None = None,
    ):
        self.photo, self.pixel_values, self.trigger_column = np.asarray(photo), pixel_values, trigger_column
        self.size = map_size(photo, min(config.size, _SIZE))
        self.tree_size = map_size(photo, min(config.size, _TREE_SIZE))
        self.colours, self.config, self.steps = PCAColours.fit(teacher_features), config, steps
        # Most changes happen early.
        self.watched = set(np.unique(np.geomspace(1, steps, _NUM_FRAMES).round().astype(int) - 1).tolist())
        self.frames: list[_MovieFrame] = []

    def on_step(self, step: int, model: APMModel) -> None:
        """Record a step of [`apm_hf.ttt.photos.fit_photo`]; call once more with the fitted model and `steps`."""
        if step not in self.watched and step != self.steps:
            return
        fine, coarse = (
            query_map(model, self.pixel_values, size, trigger_column=self.trigger_column)[0][0]
            for size in (self.size, self.tree_size)
        )
        self.frames.append(_MovieFrame(step, self.colours(fine), self.colours(coarse), RegionTree.fit(coarse)))

    def write(self, output_dir: Path, *, fps: float = 5.0) -> list[Path]:
        """Write `islands.gif` and, if OpenCV is installed, `islands.mp4`; return their paths."""
        aspect = self.size[0] / self.size[1]
        frames = [
            figure_pixels(draw_panels([self._panels(frame, cuts)], aspect, dpi=_DPI))
            for frame, cuts in zip(self.frames, self.cuts(), strict=True)
        ]
        frames += frames[-1:] * round(2 * fps)  # hold the last frame
        return write_movies(output_dir, "islands", np.stack(frames), fps)

    def cuts(self) -> list[list[np.ndarray]]:
        """Return, for every frame, one label map `(rows, cols)` for each of the heights."""
        *before, last = self.frames
        distances = [last.tree.height(count) for count in self.config.heights]
        # Not by distance: merges may happen at equal ones.
        final = last.tree.cuts(self.config.heights)
        return [[frame.tree.cut_at(distance) for distance in distances] for frame in before] + [final]

    def _panels(self, frame: "_MovieFrame", cuts: Sequence[np.ndarray]) -> list[Panel]:
        panels = [Panel("photo", self.photo), Panel(f"step {frame.step} of {self.steps}", frame.colours)]
        for labels in cuts:
            count = labels.max() + 1
            title = f"{count} regions" if count > 1 else "1 region"
            panels.append(Panel(title, draw_regions(self.photo, labels, _means(frame.coarse_colours, labels))))
        return panels


@dataclass(frozen=True, eq=False)
class _MovieFrame:
    """Hold a frame's colours `(rows, cols, 3)`, fine and at the resolution of the tree's map."""

    step: int
    colours: np.ndarray
    coarse_colours: np.ndarray
    tree: RegionTree


def _means(colours: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Paint every region in its mean colour: `(rows, cols, 3)`."""
    sizes = np.bincount(labels.ravel())
    sums = [np.bincount(labels.ravel(), weights=channel.ravel()) for channel in np.moveaxis(colours, -1, 0)]
    return (np.stack(sums, axis=1) / sizes[:, None])[labels]
