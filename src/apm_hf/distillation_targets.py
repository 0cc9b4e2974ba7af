"""A batch of images -> what a student should answer about it, and where: asking the teacher, asking the student.

The student is asked at the centres of the teacher's patches, wherever its own grid lies, so targets are never
interpolated. With a shift the teacher sees a moved image, so that it answers between its patches (the jitter of
FeatUp, arXiv:2403.10516): over many steps a student that answers at any coordinate is taught at every coordinate.

Legend: B images, L locations, N levels, C width of a level, F feature width, (rows, cols) the teacher's grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dense_targets import moved
from .losses import DistillationTargets, normalise_levels, rgb_targets
from .modeling_apm import APMModelOutput
from .position_encoding import grid_coordinates
from .teachers import Teacher


class TargetMaker:
    """A batch of the data loader -> what the student should answer.

    Args:
        teacher: asked for every batch that does not carry its targets already, as `image_embeds` `(B, F)` and
            `features` `(B, rows, cols, F)`.
        image_processor: the student's; its normalisation is undone for the colours.
        layers: of the teacher, whose patch tokens are the student's levels, low to high.
    """

    def __init__(self, teacher: Teacher | None, image_processor: Any, *, layers: Sequence[int] | None = None):
        self.teacher, self.layers = teacher, layers
        normalised = image_processor.do_normalize and not getattr(image_processor, "do_min_max", False)
        mean = image_processor.image_mean if normalised else (0.0, 0.0, 0.0)
        std = image_processor.image_std if normalised else (1.0, 1.0, 1.0)
        mean, std = (values if isinstance(values, list | tuple) else (values,) * 3 for values in (mean, std))
        order = (2, 1, 0) if getattr(image_processor, "do_flip_channel_order", False) else (0, 1, 2)
        self.mean = torch.tensor([mean[i] for i in order])
        self.std = torch.tensor([std[i] for i in order])

    def __call__(
        self, batch: dict[str, Tensor], *, shift: tuple[float, float] = (0.0, 0.0)
    ) -> tuple[DistillationTargets, Tensor | None, tuple[int, int]]:
        """What the student should answer, where, and on which grid.

        Args:
            shift: by which part of a patch the teacher's grid is moved, (down, right): it is shown the moved image.

        Returns:
            The targets at every patch of the teacher, row-major; the coordinates of their centres `(L, 2)`, (y, x),
            or None for the plain grid; the grid, (rows, cols).
        """
        pixels = batch["pixel_values"]
        levels = batch.get("levels")
        if "features" in batch:
            if any(shift):
                raise ValueError("jitter: expected a teacher to show moved images to, got batches with features")
            image_embeds, features = batch["image_embeds"], batch["features"]
        elif self.teacher is not None:
            seen = batch["teacher_pixel_values"]
            if any(shift):
                seen = moved(seen, *(part * self.teacher.patch_size for part in shift))
            answer = self.teacher.encode_images(pixel_values=seen, layers=self.layers)
            assert answer.image_embeds is not None and answer.features is not None
            image_embeds, features = answer.image_embeds, answer.features
            levels = None if answer.levels is None else normalise_levels(answer.levels)
        else:
            raise ValueError(f"expected a teacher, or batches with image_embeds and features, got {sorted(batch)}")
        rows, cols = features.shape[1:3]
        coordinates = None
        if any(shift):
            step = torch.tensor([2 * shift[0] / rows, 2 * shift[1] / cols])
            coordinates = (grid_coordinates(rows, cols) + step).to(pixels.device)
            pixels = moved(pixels, shift[0] * pixels.shape[2] / rows, shift[1] * pixels.shape[3] / cols)
        rgb = rgb_targets(pixels, rows, cols, mean=self.mean.to(pixels.device), std=self.std.to(pixels.device))
        features = features.flatten(1, 2).to(pixels.device)  # (B, rows, cols, F) -> (B, L, F)
        if levels is not None:
            levels = levels.flatten(2, 3).transpose(1, 2).to(pixels.device)  # (B, N, rows, cols, C) -> (B, L, N, C)
        targets = DistillationTargets(image_embeds.to(pixels.device), features, rgb, levels)
        return targets, coordinates, (rows, cols)


def ask(
    student: Any,
    pixel_values: Tensor,
    targets: DistillationTargets,
    grid: tuple[int, int],
    *,
    coordinates: Tensor | None = None,
    locations: Tensor | None = None,
) -> APMModelOutput:
    """Ask the student where its targets lie: `(B, L, ...)`, or at those with indices `locations`.

    Args:
        grid: the teacher's, (rows, cols), at whose centres the targets lie,
        coordinates: `(L, 2)`, (y, x), unless they lie there.
    """
    config = getattr(student, "module", student).config
    trigger_column = targets.image_embeds if config.trigger_source == "embedding" else None
    # Where they are the student's own grid, None costs less.
    if coordinates is None and (locations is not None or grid != (config.grid_size, config.grid_size)):
        coordinates = grid_coordinates(*grid, device=pixel_values.device)
    if coordinates is not None and locations is not None:
        coordinates = coordinates[locations]
    return student(pixel_values, coordinates, trigger_column=trigger_column)
