"""Compute the targets of a batch with the teachers, and query the student where they lie.

The student is queried at the centres of the teacher's patches, wherever its own grid lies, so targets are never
interpolated. With a shift the teacher reads a moved image, so that its features lie between its patches (the jitter of
FeatUp, arXiv:2403.10516): over many steps the student is taught at every coordinate.

Each of several teachers reads the image through its own processor, and its head is queried at the centres of its own
patches, all heads in one pass.

Legend: B images, L locations, N levels, C width of a level, F feature width, (rows, cols) the teacher's grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..modeling_apm import APMModelOutput
from ..position_encoding import grid_coordinates
from ..teachers import Teacher, TeacherOutput
from ..teachers.dense_grids import moved
from ..teachers.targets import normalise_levels, rgb_targets
from .losses import DistillationTargets


class TargetMaker:
    """Compute the student's targets for a batch of the data loader.

    Args:
        teacher: runs on every batch that does not carry its targets already, as `image_embeds` `(B, F)` and
            `features` `(B, rows, cols, F)`; or, for L locations of each image, `features` `(B, L, F)`, `locations`
            `(B, L)` in the row-major grid, and `grid` `(B, 2)`; see [`apm_hf.teachers.feature_cache`].
        image_processor: the student's; its normalisation is undone for the colours.
        layers: of the teacher, whose patch tokens are the student's levels, low to high.
        teachers: additional ones, by the names of their heads; for a head NAME, batches carry
            `teacher_pixel_values.NAME`, or the targets themselves, `image_embeds.NAME` and `features.NAME`.
        teacher_batch_size: images per forward pass of a teacher; None takes the batch at once.
    """

    def __init__(
        self,
        teacher: Teacher | None,
        image_processor: Any,
        *,
        layers: Sequence[int] | None = None,
        teachers: Mapping[str, Teacher] | None = None,
        teacher_batch_size: int | None = None,
    ):
        self.teacher, self.layers, self.teachers = teacher, layers, dict(teachers or {})
        self.teacher_batch_size = teacher_batch_size
        normalised = image_processor.do_normalize and not getattr(image_processor, "do_min_max", False)
        mean = image_processor.image_mean if normalised else (0.0, 0.0, 0.0)
        std = image_processor.image_std if normalised else (1.0, 1.0, 1.0)
        mean, std = (values if isinstance(values, list | tuple) else (values,) * 3 for values in (mean, std))
        order = (2, 1, 0) if getattr(image_processor, "do_flip_channel_order", False) else (0, 1, 2)
        self.mean = torch.tensor([mean[i] for i in order])
        self.std = torch.tensor([std[i] for i in order])

    def __call__(self, batch: dict[str, Tensor], *, shift: tuple[float, float] = (0.0, 0.0)) -> DistillationTargets:
        """Return the targets of the main head.

        Args:
            shift: the part of a patch by which the teacher's grid is moved, (down, right): it reads the moved image.
        """
        main = self._head_targets(batch, self.teacher, "", shift)
        (rows, cols), pixels = main.grid, batch["pixel_values"]
        if any(shift):
            pixels = moved(pixels, shift[0] * pixels.shape[2] / rows, shift[1] * pixels.shape[3] / cols)
        rgb = rgb_targets(pixels, rows, cols, mean=self.mean.to(pixels.device), std=self.std.to(pixels.device))
        if "locations" in batch:
            rgb = rgb.take_along_dim(batch["locations"].to(rgb.device)[..., None], dim=1)  # (B, L, 3)
        return replace(main, rgb=rgb)

    def additional(
        self, batch: dict[str, Tensor], *, shift: tuple[float, float] = (0.0, 0.0)
    ) -> dict[str, DistillationTargets]:
        """Return the targets of the additional heads by name, without colours and levels.

        Heads are left out whose teacher is missing, unless the batch carries their targets.
        """
        cached = {name.removeprefix("features."): None for name in batch if name.startswith("features.")}
        teachers = {**cached, **self.teachers}
        if teachers and "locations" in batch:  # heads are queried at the same locations of all images
            raise ValueError("feature_cache: expected complete grids beside additional teachers, got some locations")
        return {name: self._head_targets(batch, teachers[name], f".{name}", shift) for name in sorted(teachers)}

    def _head_targets(
        self, batch: dict[str, Tensor], teacher: Teacher | None, suffix: str, shift: tuple[float, float]
    ) -> DistillationTargets:
        device, layers = batch["pixel_values"].device, None if suffix else self.layers
        levels = None if suffix else batch.get("levels")
        if f"features{suffix}" in batch:
            if any(shift):
                raise ValueError("jitter: expected a teacher that reads moved images, got batches with features")
            image_embeds, features = batch[f"image_embeds{suffix}"], batch[f"features{suffix}"]
        elif teacher is not None:
            pixels = batch[f"teacher_pixel_values{suffix}"]
            if any(shift):
                pixels = moved(pixels, *(part * teacher.patch_size for part in shift))
            parts = pixels.split(self.teacher_batch_size or len(pixels))
            outputs = [teacher.encode_images(pixel_values=part, layers=layers) for part in parts]
            image_embeds, features = _joined(outputs, "image_embeds"), _joined(outputs, "features")
            levels = None if layers is None else normalise_levels(_joined(outputs, "levels"))
        else:
            raise ValueError(f"expected a teacher, or batches with image_embeds and features, got {sorted(batch)}")
        if not suffix and "locations" in batch:
            return _at_locations(batch, levels, device)
        rows, cols = features.shape[1:3]
        coordinates = None
        if any(shift):
            step = torch.tensor([2 * shift[0] / rows, 2 * shift[1] / cols], dtype=torch.float32)
            coordinates = (grid_coordinates(rows, cols) + step).to(device)
        features = features.flatten(1, 2).to(device)  # (B, rows, cols, F) -> (B, L, F)
        if levels is not None:
            levels = levels.flatten(2, 3).transpose(1, 2).to(device)  # (B, N, rows, cols, C) -> (B, L, N, C)
        return DistillationTargets(
            image_embeds.to(device), features, levels=levels, grid=(rows, cols), coordinates=coordinates
        )


def _at_locations(batch: dict[str, Tensor], levels: Tensor | None, device: torch.device) -> DistillationTargets:
    """Return the targets of a batch that carries them for some locations of each image only."""
    rows, cols = batch["grid"][0].tolist()
    coordinates = grid_coordinates(rows, cols, device=device)[batch["locations"].to(device)]  # (B, L, 2)
    if levels is not None:
        levels = levels.transpose(1, 2).to(device)  # (B, N, L, C) -> (B, L, N, C)
    return DistillationTargets(
        batch["image_embeds"].to(device),
        batch["features"].to(device),
        levels=levels,
        grid=(rows, cols),
        coordinates=coordinates,
    )


def _joined(outputs: Sequence[TeacherOutput], name: str) -> Tensor:
    return torch.cat([getattr(output, name) for output in outputs]) if len(outputs) > 1 else getattr(outputs[0], name)


def query_student(
    student: Any,
    pixel_values: Tensor,
    targets: DistillationTargets,
    *,
    locations: Tensor | None = None,
    heads: Sequence[str] = (),
) -> APMModelOutput:
    """Query the student where its targets lie, `(B, L, ...)`, or at those of them with indices `locations`.

    Args:
        heads: names of additional teachers' heads, queried at the same locations.
    """
    config = getattr(student, "module", student).config
    trigger_column = targets.image_embeds if config.trigger_source == "embedding" else None
    coordinates = targets.coordinates
    # Where they are the student's own grid, None costs less.
    if coordinates is None and (locations is not None or targets.grid != (config.grid_size, config.grid_size)):
        coordinates = grid_coordinates(*targets.grid, device=pixel_values.device)
    if coordinates is not None and locations is not None:
        coordinates = coordinates[..., locations, :]
    return student(pixel_values, coordinates, trigger_column=trigger_column, heads=tuple(heads))


def query_heads(
    student: Any,
    pixel_values: Tensor,
    main: DistillationTargets,
    additional: Mapping[str, DistillationTargets],
    locations: Mapping[tuple[int, int], Tensor],
) -> tuple[APMModelOutput, dict[str, APMModelOutput]]:
    """Query all heads in one pass, each where its own targets lie; teachers with the same grid share locations.

    Embeddings are pooled over all locations that are queried, each grid of which covers the image evenly.

    Args:
        locations: by grid, the indices of the patches to query; all of them for grids that are missing.

    Returns:
        The main head's outputs, and by name those of the additional heads: `last_hidden_state` and `pooler_output`.
    """
    spans: dict[tuple[int, int], slice] = {}
    places: list[Tensor] = []
    for head in (main, *additional.values()):
        if head.grid not in spans:
            coordinates = head.coordinates
            if coordinates is None:
                coordinates = grid_coordinates(*head.grid, device=pixel_values.device)
            places.append(coordinates[..., locations.get(head.grid, slice(None)), :])
            first = sum(one.shape[-2] for one in places[:-1])
            spans[head.grid] = slice(first, first + places[-1].shape[-2])
    if len(spans) == 1:
        everywhere, drawn = main, locations.get(main.grid)
    else:
        everywhere, drawn = replace(main, coordinates=torch.cat(places)), None
    outputs = query_student(student, pixel_values, everywhere, locations=drawn, heads=list(additional))
    others = {}
    for name, head in additional.items():
        assert outputs.teacher_features is not None and outputs.teacher_embeds is not None
        features = outputs.teacher_features[name][:, spans[head.grid]]
        others[name] = APMModelOutput(last_hidden_state=features, pooler_output=outputs.teacher_embeds[name])
    span = spans[main.grid]
    own = {name: getattr(outputs, name) for name in ("last_hidden_state", "rgb", "levels")}
    own = {name: None if values is None else values[:, span] for name, values in own.items()}
    return APMModelOutput(pooler_output=outputs.pooler_output, **own), others
