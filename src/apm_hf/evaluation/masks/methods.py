"""Define the compared methods: the teacher's grid, colours, superpixels, and the APM, adapted or not, with controls.

A method gets complete images, resized to a square, and returns a map of features, from which segments and probes are
computed in the same way for all; superpixels and random segments have no features and return segments directly.

Legend: B images, F width of the features, (rows, cols) a map of locations, row-major, over the complete image.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...distillation.rivals import Upsampler, bicubic
from ...modeling_apm import APMModel
from ...pair import APM
from ...position_encoding import grid_coordinates
from ...teachers import Teacher
from ...teachers.dense_grids import encode_densely
from ...teachers.targets import normalise_levels
from ...ttt import TTTConfig, adapt
from ...ttt.maps import feature_map, upsample
from ...ttt.photos import random_model, whole_photos
from ...ttt.targets import TTTTargets

Images = Sequence[PIL.Image.Image]
Size = tuple[int, int]
MOVED_FACTOR = 2  # refinement of the rival that gets shifted images: four of them

# In the order of the tables. With levels, `teacher_level_1`, `apm_level_1` and so on come after `teacher` and `apm`.
TITLES = {
    "teacher": "teacher, upsampled",
    "teacher_moved": "teacher on moved images, upsampled",
    "teacher_twice": "teacher at twice the side",
    "bicubic": "teacher, bicubic",
    "ridge": "ridge regression from the same photos",
    "bilateral": "joint bilateral upsampling, tuned on them",
    "attention": "attention upsampler, fitted to them",
    "apm": "APM distilled",
    "apm_ttt": "APM distilled + TTT",
    "apm_ttt_alone": "APM TTT alone",
    "rgb": "RGB k-means",
    "slic": "SLIC",
    "apm_random": "APM random weights",
    "image_shuffled": "APM, image shuffled",
    "position_only": "APM, position only",
    "shuffled_masks": "APM, masks shuffled",
    "random": "random segments",
}
OF_ADAPTED = ("apm_ttt", "apm_ttt_alone")
OF_DENSE = (
    "teacher_twice",
    "bicubic",
    "ridge",
    "bilateral",
    "attention",
)  # beside a student that reads the teacher's tokens
OF_DISTILLED = ("apm", "apm_ttt", "image_shuffled", "position_only", "shuffled_masks")
# Rows computed from the distilled APM's maps; they differ in the input image or in what the maps are used for.
OF_SAME_MAPS = ("apm", "image_shuffled", "position_only", "shuffled_masks")


@dataclass(frozen=True)
class Job:
    """Describe one method and the rows of the tables that its maps produce.

    Args:
        name: name in file names.
        rows: keys of `TITLES` or names of levels.
        maps: `(images, size)` -> `(B, rows, cols, F)`; or None.
        segments: `(image, num_segments, size=..., generator=...)` -> `(rows, cols)`, if there are no maps.
        subject: (model, level), if agreement is measured.
        depends_on: additional values that determine its results.
    """

    name: str
    rows: tuple[str, ...]
    maps: Callable[[Images, Size], Tensor] | None = None
    segments: Callable[..., NDArray[np.int64]] | None = None
    subject: tuple[str, str] | None = None
    depends_on: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Models:
    """Hold the teacher, the student and how it is adapted.

    Args:
        apm: the pair; of an untrained student only the architecture is used.
        level_layers: the teacher's layers that the student's levels are compared with, low to high.
        ttt: how the student is adapted to the teacher's features of an image.
        ttt_factor: refinement of the teacher's grid for these features.
        seed: random seed of the controls' weights.
        rivals: what was fitted to the same photos as a dense student, by name.
    """

    apm: APM
    level_layers: tuple[int, ...]
    ttt: TTTConfig
    ttt_factor: int
    seed: int
    rivals: Mapping[str, Upsampler] = field(default_factory=dict)

    @property
    def teacher(self) -> Teacher:
        """The teacher."""
        assert self.apm.teacher is not None
        return self.apm.teacher

    @property
    def model(self) -> APMModel:
        """The student without a head."""
        return self.apm.bare_model

    @property
    def all_rivals(self) -> dict[str, Upsampler]:
        """Return what stands beside a student that reads the teacher's tokens, by name."""
        return {"bicubic": bicubic, **self.rivals} if _reads_tokens(self) else {}

    @property
    def teacher_grid(self) -> Size:
        """(rows, cols) of the teacher's features at its usual side."""
        side = self.teacher.image_size // self.teacher.patch_size
        return side, side

    def encode(self, images: Images, *, factor: int = 1, layers: Sequence[int] | None = None) -> Any:
        """Return the teacher's outputs on a grid `factor` times as fine as its default."""
        side = self.teacher.image_size
        pixels = whole_photos(self.teacher.image_processor, images, (side, side))
        return encode_densely(self.teacher, pixels, factor, layers=layers)

    def inputs(self, images: Images) -> tuple[Tensor, Tensor | None]:
        """Return an APM's inputs: pixels `(B, 3, S, S)`, and a trigger column `(B, D)` if it does not compute one."""
        pixels = self.apm.pixel_values(list(images))
        if self.model.config.trigger_source == "embedding":
            return pixels, self.encode(images).image_embeds.to(pixels.device)  # of the complete image
        return pixels, self.apm.trigger_column(list(images), pixels)

    def teacher_maps(self, images: Images, size: Size, *, factor: int = 1) -> Tensor:
        """Return the teacher's features, interpolated: `(B, rows, cols, F)`."""
        return upsample(self.encode(images, factor=factor).features, size)

    def twice_maps(self, images: Images, size: Size) -> Tensor:
        """Interpolate the teacher's features of images of twice its side: four times its tokens."""
        side = 2 * self.teacher.image_size
        pixels = whole_photos(self.teacher.image_processor, images, (side, side))
        features = self.teacher.encode_images(pixel_values=pixels).features
        assert features is not None
        return upsample(features, size)

    def rival_maps(self, images: Images, size: Size, *, rival: Upsampler) -> Tensor:
        """Upsample the tokens that a dense student reads in another way."""
        pixels, tokens = self.inputs(images)
        assert tokens is not None
        with torch.inference_mode():
            return rival(tokens.cpu(), grid_coordinates(*size)[None], pixels.cpu()).unflatten(1, size)

    def teacher_level_maps(self, images: Images, size: Size, *, layer: int) -> Tensor:
        """Return the normalised tokens of a teacher's layer, interpolated: `(B, rows, cols, C)`."""
        return upsample(normalise_levels(self.encode(images, layers=[layer]).levels[:, 0]), size)

    def apm_maps(self, images: Images, size: Size, *, model: APMModel, level: int | None = None) -> Tensor:
        """Query a student at every location: its features `(B, rows, cols, F)`, or one of its levels."""
        pixels, trigger_column = self.inputs(images)
        if level is None:
            return feature_map(model, pixels, size, trigger_column=trigger_column)
        return feature_map(model, pixels, size, trigger_column=trigger_column, output="levels")[:, level]

    def adapted_maps(self, images: Images, size: Size, *, start: str) -> Tensor:
        """Fit models to the teacher's grid of each image, then query them.

        Raises:
            ValueError: if a fit diverged.
        """
        pixels, trigger_column = self.inputs(images)
        features = self.encode(images, factor=self.ttt_factor).features
        num_cells, num_locations = features.shape[1] * features.shape[2], self.ttt.num_locations
        config = replace(
            self.ttt, start=start, num_locations=None if num_locations is None else min(num_locations, num_cells)
        )
        adapted = adapt(
            self.model, pixels, TTTTargets(features=features), config=config, trigger_column=trigger_column
        )
        if adapted.diverged.any():
            raise ValueError(
                f"ttt: expected fits that converge, {int(adapted.diverged.sum())} of {len(images)} diverged at "
                f"learning_rate={self.ttt.learning_rate}; lower it"
            )
        return feature_map(adapted, None, size)


def colour_maps(images: Images, size: Size) -> Tensor:
    """Return mean colours in [-0.5, 0.5] with a constant appended, `(B, rows, cols, 4)`.

    Maps are clustered by direction; with a large constant appended, directions differ as the colours themselves do, so
    that dark and bright remain distinct.
    """
    height, width = size
    small = [image.resize((width, height), PIL.Image.Resampling.BILINEAR) for image in images]
    colours = torch.from_numpy(np.stack([np.asarray(image) for image in small])).float() / 255 - 0.5
    return torch.cat([colours, torch.full((*colours.shape[:-1], 1), 4.0)], dim=-1)


def slic_segments(
    image: PIL.Image.Image, num_segments: int, *, size: Size, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Compute SLIC superpixels (Achanta et al. 2012, 10.1109/TPAMI.2012.120), the fewest that are at least as many.

    SLIC starts from a square grid of seeds, and makes one segment of two requested; the requested number is raised
    until enough are found, up to four times as many.
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise ImportError('SLIC needs scikit-image: pip install "apm_hf[viz]"') from error
    height, width = size
    small = np.asarray(image.resize((width, height), PIL.Image.Resampling.BILINEAR))
    labels = np.zeros(size, dtype=np.int64)
    for requested in range(num_segments, 4 * num_segments + 1):
        labels = slic(small, n_segments=requested, start_label=0).astype(np.int64)
        if len(np.unique(labels)) >= num_segments:
            break
    return labels


def random_segments(
    image: PIL.Image.Image, num_segments: int, *, size: Size, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Assign each location to the nearest of `num_segments` random points: a prior of coherent segments only."""
    places = generator.random((num_segments, 2))
    rows, cols = ((np.arange(count) + 0.5) / count for count in size)
    distances = (rows[:, None, None] - places[:, 0]) ** 2 + (cols[None, :, None] - places[:, 1]) ** 2
    return distances.argmin(axis=-1)


def titles(models: Models) -> dict[str, str]:
    """Return name -> title of every possible row, in order."""
    found = {}
    for name, title in TITLES.items():
        if name in OF_DISTILLED and not models.apm.is_fitted:
            continue
        if name in OF_DENSE and name != "teacher_twice" and name not in models.all_rivals:
            continue
        if name == "teacher_twice" and not _reads_tokens(models):
            continue
        if name in OF_ADAPTED and _reads_tokens(models):
            continue  # it reads what the others are adapted to
        found[name] = title
        num_levels = {"teacher": len(models.level_layers), "apm": models.model.config.num_levels}.get(name, 0)
        for number in range(1, num_levels + 1):
            layer = f" (layer {models.level_layers[number - 1]})" if name == "teacher" else ""
            found[f"{name}_level_{number}"] = f"{title.split(',')[0]}, level {number}{layer}"
    return found


def _digest(rival: Upsampler) -> str:
    """Return the SHA-256 of a rival's numbers."""
    values = rival.state_dict() if isinstance(rival, torch.nn.Module) else getattr(rival, "__dict__", {})
    digest = hashlib.sha256(str(sorted(values)).encode())
    for name in sorted(values):
        digest.update(torch.as_tensor(values[name]).numpy().tobytes())
    return digest.hexdigest()


def _reads_tokens(models: Models) -> bool:
    return models.model.config.trigger_source == "tokens"


def make_jobs(models: Models, rows: Sequence[str]) -> list[Job]:
    """Make the jobs that produce these rows; agreement of random weights' levels is measured with both."""
    model = models.model
    same_maps = tuple(name for name in OF_SAME_MAPS if name in rows)
    adapting = {"ttt": repr(models.ttt), "ttt_factor": models.ttt_factor}
    jobs = [Job("teacher", ("teacher",), models.teacher_maps, subject=("teacher", "features"))]
    for number, layer in enumerate(models.level_layers, start=1):
        name, maps = f"teacher_level_{number}", partial(models.teacher_level_maps, layer=layer)
        jobs.append(Job(name, (name,), maps, subject=("teacher", f"level {number}"), depends_on={"layer": layer}))
    moved = partial(models.teacher_maps, factor=MOVED_FACTOR)
    jobs.append(Job("teacher_moved", ("teacher_moved",), moved))
    jobs.append(Job("teacher_twice", ("teacher_twice",), models.twice_maps))
    for name, rival in models.all_rivals.items():
        maps = partial(models.rival_maps, rival=rival)
        jobs.append(Job(name, (name,), maps, depends_on={"rival": _digest(rival)}))
    if same_maps:
        subject = ("APM", "features") if "apm" in rows else None
        jobs.append(Job("apm", same_maps, partial(models.apm_maps, model=model), subject=subject))
    for level in range(model.config.num_levels):
        name, maps = f"apm_level_{level + 1}", partial(models.apm_maps, model=model, level=level)
        jobs.append(Job(name, (name,), maps, subject=("APM", f"level {level + 1}")))
    for name, start in (("apm_ttt", "model"), ("apm_ttt_alone", "random")):
        jobs.append(Job(name, (name,), partial(models.adapted_maps, start=start), depends_on=adapting))
    jobs.append(Job("rgb", ("rgb",), colour_maps))
    jobs.append(Job("slic", ("slic",), segments=slic_segments))
    if "apm_random" in rows:
        drawn = random_model(model.config, seed=models.seed).to(model.device)
        for level in (None, *range(model.config.num_levels)):
            maps = partial(models.apm_maps, model=drawn, level=level)
            if level is None:
                jobs.append(Job("apm_random", ("apm_random",), maps, subject=("APM random", "features")))
            else:  # agreement only
                name = f"apm_random_level_{level + 1}"
                jobs.append(Job(name, (), maps, subject=("APM random", f"level {level + 1}")))
    jobs.append(Job("random", ("random",), segments=random_segments))
    needs_levels = any(name.startswith("apm_level_") for name in rows)
    return [job for job in jobs if set(job.rows) & set(rows) or (not job.rows and needs_levels)]
