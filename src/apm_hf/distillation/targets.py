"""A batch of images -> what a student should answer about it, and where: asking the teacher, asking the student.

The student is asked at the centres of the teacher's patches, wherever its own grid lies, so targets are never
interpolated. With a shift the teacher sees a moved image, so that it answers between its patches (the jitter of
FeatUp, arXiv:2403.10516): over many steps a student that answers at any coordinate is taught at every coordinate.

Of several teachers each is shown the image through a processor of its own, and its head is asked at the centres of
its own patches, all heads in one pass.

Legend: B images, L locations, N levels, C width of a level, F feature width, (rows, cols) the teacher's grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modeling_apm import APMModelOutput
from ..position_encoding import grid_coordinates
from ..teachers import Teacher, TeacherOutput
from ..teachers.dense_grids import moved
from ..teachers.targets import normalise_levels, rgb_targets
from .losses import DistillationTargets


class Question(NamedTuple):
    """What a head is to answer.

    Args:
        targets: at every patch of its teacher, row-major, or at those that a cache kept.
        coordinates: `(L, 2)`, or `(B, L, 2)` where every image is asked at places of its own, (y, x), of the patches'
            centres; None for those of the plain grid.
        grid: the teacher's, (rows, cols).
    """

    targets: DistillationTargets
    coordinates: Tensor | None
    grid: tuple[int, int]


class TargetMaker:
    """A batch of the data loader -> what the student should answer.

    Args:
        teacher: asked for every batch that does not carry its targets already, as `image_embeds` `(B, F)` and
            `features` `(B, rows, cols, F)`; or, of L places of each image, `features` `(B, L, F)`, `locations`
            `(B, L)` in the row-major grid, and `grid` `(B, 2)`; see [`apm_hf.teachers.feature_cache`].
        image_processor: the student's; its normalisation is undone for the colours.
        layers: of the teacher, whose patch tokens are the student's levels, low to high.
        teachers: further ones, by the names of their heads; of a head NAME, batches carry `teacher_pixel_values.NAME`
            or the answers themselves, `image_embeds.NAME` and `features.NAME`.
        teacher_batch_size: images that a teacher is shown at a time; None shows all of a batch.
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

    def __call__(self, batch: dict[str, Tensor], *, shift: tuple[float, float] = (0.0, 0.0)) -> Question:
        """What the main head should answer, where, and on which grid.

        Args:
            shift: by which part of a patch the teacher's grid is moved, (down, right): it is shown the moved image.
        """
        question = self._question(batch, self.teacher, "", shift)
        (rows, cols), pixels = question.grid, batch["pixel_values"]
        if any(shift):
            pixels = moved(pixels, shift[0] * pixels.shape[2] / rows, shift[1] * pixels.shape[3] / cols)
        rgb = rgb_targets(pixels, rows, cols, mean=self.mean.to(pixels.device), std=self.std.to(pixels.device))
        if "locations" in batch:
            rgb = rgb.take_along_dim(batch["locations"].to(rgb.device)[..., None], dim=1)  # (B, L, 3)
        return question._replace(targets=replace(question.targets, rgb=rgb))

    def further(self, batch: dict[str, Tensor], *, shift: tuple[float, float] = (0.0, 0.0)) -> dict[str, Question]:
        """The same for the further heads whose teachers are there, or their answers, by name; no colours or levels."""
        cached = {name.removeprefix("features."): None for name in batch if name.startswith("features.")}
        teachers = {**cached, **self.teachers}
        if teachers and "locations" in batch:  # heads are asked at the same places of all images
            raise ValueError("feature_cache: expected whole grids beside further teachers, got some locations")
        return {name: self._question(batch, teachers[name], f".{name}", shift) for name in sorted(teachers)}

    def _question(
        self, batch: dict[str, Tensor], teacher: Teacher | None, suffix: str, shift: tuple[float, float]
    ) -> Question:
        device, layers = batch["pixel_values"].device, None if suffix else self.layers
        levels = None if suffix else batch.get("levels")
        if f"features{suffix}" in batch:
            if any(shift):
                raise ValueError("jitter: expected a teacher to show moved images to, got batches with features")
            image_embeds, features = batch[f"image_embeds{suffix}"], batch[f"features{suffix}"]
        elif teacher is not None:
            seen = batch[f"teacher_pixel_values{suffix}"]
            if any(shift):
                seen = moved(seen, *(part * teacher.patch_size for part in shift))
            parts = seen.split(self.teacher_batch_size or len(seen))
            answers = [teacher.encode_images(pixel_values=part, layers=layers) for part in parts]
            image_embeds, features = _joined(answers, "image_embeds"), _joined(answers, "features")
            levels = None if layers is None else normalise_levels(_joined(answers, "levels"))
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
        targets = DistillationTargets(image_embeds.to(device), features, levels=levels)
        return Question(targets, coordinates, (rows, cols))


def _at_locations(batch: dict[str, Tensor], levels: Tensor | None, device: torch.device) -> Question:
    """Of batches with the answers at some places of each image alone."""
    rows, cols = batch["grid"][0].tolist()
    coordinates = grid_coordinates(rows, cols, device=device)[batch["locations"].to(device)]  # (B, L, 2)
    if levels is not None:
        levels = levels.transpose(1, 2).to(device)  # (B, N, L, C) -> (B, L, N, C)
    targets = DistillationTargets(batch["image_embeds"].to(device), batch["features"].to(device), levels=levels)
    return Question(targets, coordinates, (rows, cols))


def _joined(answers: Sequence[TeacherOutput], name: str) -> Tensor:
    return torch.cat([getattr(answer, name) for answer in answers]) if len(answers) > 1 else getattr(answers[0], name)


def ask(
    student: Any,
    pixel_values: Tensor,
    targets: DistillationTargets,
    grid: tuple[int, int],
    *,
    coordinates: Tensor | None = None,
    locations: Tensor | None = None,
    heads: Sequence[str] = (),
) -> APMModelOutput:
    """Ask the student where its targets lie: `(B, L, ...)`, or at those with indices `locations`.

    Args:
        grid: the teacher's, (rows, cols), at whose centres the targets lie,
        coordinates: `(L, 2)` or `(B, L, 2)`, (y, x), unless they lie there.
        heads: of further teachers, asked at the same places.
    """
    config = getattr(student, "module", student).config
    trigger_column = targets.image_embeds if config.trigger_source == "embedding" else None
    # Where they are the student's own grid, None costs less.
    if coordinates is None and (locations is not None or grid != (config.grid_size, config.grid_size)):
        coordinates = grid_coordinates(*grid, device=pixel_values.device)
    if coordinates is not None and locations is not None:
        coordinates = coordinates[..., locations, :]
    return student(pixel_values, coordinates, trigger_column=trigger_column, heads=tuple(heads))


def ask_all(
    student: Any,
    pixel_values: Tensor,
    main: Question,
    further: Mapping[str, Question],
    locations: Mapping[tuple[int, int], Tensor],
) -> tuple[APMModelOutput, dict[str, APMModelOutput]]:
    """Ask all heads in one pass, each where its own targets lie; teachers of one grid share the places.

    Embeddings are pooled over all the places that are asked about, each grid of which covers the image evenly.

    Args:
        locations: by grid, the indices of the patches asked about; of grids that are missing all of them.

    Returns:
        What the main head answers, and what the further ones do, as `last_hidden_state` and `pooler_output`.
    """
    spans: dict[tuple[int, int], slice] = {}
    places: list[Tensor] = []
    for question in (main, *further.values()):
        if question.grid not in spans:
            coordinates = question.coordinates
            if coordinates is None:
                coordinates = grid_coordinates(*question.grid, device=pixel_values.device)
            places.append(coordinates[..., locations.get(question.grid, slice(None)), :])
            first = sum(one.shape[-2] for one in places[:-1])
            spans[question.grid] = slice(first, first + places[-1].shape[-2])
    if len(spans) == 1:
        asked = {"coordinates": main.coordinates, "locations": locations.get(main.grid)}
    else:
        asked = {"coordinates": torch.cat(places)}
    outputs = ask(student, pixel_values, main.targets, main.grid, heads=list(further), **asked)
    answers = {}
    for name, question in further.items():
        assert outputs.teacher_features is not None and outputs.teacher_embeds is not None
        features = outputs.teacher_features[name][:, spans[question.grid]]
        answers[name] = APMModelOutput(last_hidden_state=features, pooler_output=outputs.teacher_embeds[name])
    span = spans[main.grid]
    own = {name: getattr(outputs, name) for name in ("last_hidden_state", "rgb", "levels")}
    own = {name: None if values is None else values[:, span] for name, values in own.items()}
    return APMModelOutput(pooler_output=outputs.pooler_output, **own), answers
