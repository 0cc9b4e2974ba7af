"""Load an APM with its image processor and its teacher, check that they fit, and use them for common tasks.

    apm = APM.load("user/apm-photos", teacher="openai/clip-vit-base-patch16")
    apm.encode("photo.jpg")                                # (1, F)
    apm.encode_dense("photo.jpg", size=256)                # (1, rows, cols, F)
    apm.classify("photo.jpg", ["a cat", "a dog"])          # the teacher's scores beside the adapted student's
    apm.islands("photo.jpg").regions                       # parts and wholes

Commands, the app and evaluations load their models here.

Legend: B images, L locations, K classes, F feature width, D trigger width, S image side, (rows, cols) a map of
locations, row-major; coordinates are (y, x) in [-1, 1].
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModel

# At its top level transformers 5.17 refuses this class without torchvision, though the PIL backend works.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging

from ..assets import DENSE_MODELS, PHOTO_MODEL, PHOTO_TEACHER
from ..configuration_apm import APMConfig
from ..data.images import read_rgb
from ..modeling_apm import APMModel, APMPreTrainedModel
from ..runs.identity import processor_settings, weights_digest
from ..runs.progress import no_loading_bars
from ..runs.run import manifest_faults
from ..teachers import DEFAULT_TEMPLATES, Teacher, load_teacher
from ..teachers.dense_grids import tokens_at_half
from ..teachers.images import process, rgb_images
from ..teachers.matching import matching_image_processor
from ..ttt import TTTConfig
from ..ttt.classification import TTTClassification, TTTClassifier
from ..ttt.maps import bare_model, query, upsample
from ..ttt.photos import (
    FIT_STEPS,
    fit_photo,
    map_size,
    photo_colours,
    photo_image_processor,
    photo_model,
    query_map,
    random_model,
    teacher_features,
    whole_photos,
)

if TYPE_CHECKING:
    from ..islands import RegionTree

logger = logging.get_logger(__name__)

DEFAULT_HEIGHTS = (2, 6, 20)  # numbers of regions: wholes, parts, parts of parts
EMBEDDED_NOTE = (
    "the small teacher in the package learnt photos of 100 kinds of things and some everyday words; of anything else "
    "it knows little, see docs/photo_teacher.md"
)
MAX_TREE_SIZE = 96  # locations along the longer side: trees of finer maps take minutes


@dataclass(frozen=True, eq=False)
class Islands:
    """Hold the islands of agreement of one image.

    Args:
        features: `(rows, cols, F)`, in which they were found.
        heights: numbers of regions, ascending.
        regions: `(len(heights), rows, cols)` int64, the region of every location at every height.
        tree: cuts at other heights.
    """

    features: Tensor
    heights: tuple[int, ...]
    regions: Tensor
    tree: "RegionTree"


@dataclass(frozen=True, eq=False)
class APM:
    """Bundle a student with its image processor and its teacher; made by [`APM.load`].

    Images are PIL images, paths, `uint8` arrays or tensors (channels first or last), one or a list or batch of them.

    Args:
        model: the student; None where there is a teacher alone.
        image_processor: the student's.
        teacher: frozen; None where a student was loaded alone.
        is_fitted: False for a student with random weights, which is to be fitted to images first.

    Raises:
        ValueError: for neither student nor teacher, for a student that is no APM, or for widths that differ.
    """

    model: APMPreTrainedModel | None
    image_processor: Any
    teacher: Teacher | None
    is_fitted: bool = True

    def __post_init__(self) -> None:
        model, teacher = self.model, self.teacher
        if model is None and teacher is None:
            raise ValueError("expected a model, a teacher or both, got neither")
        if model is None:
            return
        if not isinstance(model, APMPreTrainedModel):
            raise ValueError(f"model: expected an APM, got {type(model).__name__}")
        width = model.config.feature_size
        if teacher is not None and teacher.feature_size != width:
            raise ValueError(f"model: expected features as wide as the teacher's, {teacher.feature_size}, got {width}")

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | APMPreTrainedModel | None = None,
        *,
        teacher: str | os.PathLike[str] | Teacher | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> "APM":
        """Load a student and its teacher, from the Hub or folders, in evaluation mode.

        Args:
            model: the student's name or folder, whose image processor lies beside it, or the student itself, which
                then uses the teacher's preprocessing. Without model and teacher the embedded ones are loaded: a small
                teacher of photos and its dense student; what these do not know is logged. Unlike commands, this asks
                nothing of the network: outputs have the same width and values everywhere.
            teacher: its name or folder, or the teacher itself; of the width that the student was distilled to.
                `"embedded"` is the one in this package.
            device: of both; by default the teacher's, or else the first of CUDA, MPS and CPU that is there.
            dtype: of both; by default as saved, on the CPU float32 for teachers.

        Raises:
            ValueError: as the class does, and for models that cannot be used.
            OSError: for a name that is not found or cannot be reached.
        """
        if model is None and teacher is None:
            logger.warning(EMBEDDED_NOTE)
            model, teacher = PHOTO_MODEL, PHOTO_TEACHER
        if teacher is not None and not isinstance(teacher, Teacher):
            teacher = load_teacher(teacher, device=device, dtype=dtype)
        student, image_processor = model, None
        if isinstance(model, str | os.PathLike):
            for fault in manifest_faults(Path(model)):
                logger.warning(f"{fault}; it is damaged, or was changed since the run that made it")
            options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
            named = getattr(AutoConfig.from_pretrained(os.fspath(model)), "teacher_source", None)
            if teacher is not None and named is not None:
                options["teacher"] = teacher.tower
            with no_loading_bars():
                student = AutoModel.from_pretrained(os.fspath(model), **options)
        pair = cls(cast(APMPreTrainedModel | None, student), None, teacher)
        if pair.model is not None and teacher is not None:
            wanted = _teacher_digest(pair.bare_model.config)
            if wanted is not None and wanted != (found := teacher.features_digest()):
                if not pair.bare_model.folds:
                    raise ValueError(
                        "teacher: expected the one that this dense student was made for, with weights of SHA-256 "
                        f"{wanted}, got {teacher.name} with {found}"
                    )
                learnt = ", ".join(entry["name"] for entry in pair.bare_model.config.distilled_from or [])
                logger.warning(f"{teacher.name} is not the teacher that this student learnt from, {learnt}")
        if isinstance(model, str | os.PathLike):
            image_processor = AutoImageProcessor.from_pretrained(os.fspath(model))
            pair = replace(pair, image_processor=image_processor)
        if pair.model is None:
            return pair
        if device is None and teacher is not None:
            device = teacher.device
        pair.model.eval()
        if device is not None:
            pair.model.to(device)
        if image_processor is not None:
            return pair
        if teacher is None:
            return replace(pair, image_processor=photo_image_processor(bare_model(pair.model).config.image_size))
        return replace(pair, image_processor=matching_image_processor(teacher, pair.model.config.image_size))

    def fresh(self, *, local_patch: bool = True, seed: int = 0) -> "APM":
        """Return a pair with a small student of random weights, to be fitted to images by [`APM.fit`].

        Args:
            local_patch: whether the student sees the pixels around each location.
            seed: random seed of the weights.

        Raises:
            ValueError: without a teacher, whose features a student is fitted to.
        """
        teacher = self._needed_teacher("to fit a student to")
        model = photo_model(teacher.feature_size, local_patch=local_patch, seed=seed).to(teacher.device)
        return APM(model, photo_image_processor(model.config.image_size), teacher, is_fitted=False)

    def with_dense_student(self) -> "APM | None":
        """Return the teacher beside the dense student of it in this package; None where there is none.

        Which teacher a student was made for is told by the SHA-256 of the teacher's weights.
        """
        teacher = self._needed_teacher("whose tokens a dense student reads")
        configs = {folder: APMConfig.from_pretrained(folder) for folder in DENSE_MODELS}
        if teacher.feature_size not in {config.feature_size for config in configs.values()}:
            return None  # large teachers are not read through
        digest = teacher.features_digest()
        found = next((folder for folder, config in configs.items() if _teacher_digest(config) == digest), None)
        return None if found is None else APM.load(found, teacher=teacher)

    def control(self, *, seed: int = 0) -> "APM":
        """Return the pair with random weights in the student's place: what it outputs is due to the architecture."""
        model = self._needed_model()
        drawn = random_model(model.config, seed=seed).to(model.device)
        if self.bare_model.config.trigger_source == "tokens":
            drawn.trigger = self.bare_model.trigger  # the teacher is no part of what is drawn
        return replace(self, model=drawn)

    @property
    def bare_model(self) -> APMModel:
        """The student without a head.

        Raises:
            ValueError: where there is a teacher alone.
        """
        return bare_model(self._needed_model())

    @property
    def is_embedded(self) -> bool:
        """Return whether this is the pair in this package that is loaded where nothing is named."""
        return self.model is not None and self.model.name_or_path == PHOTO_MODEL

    @property
    def has_embedded_teacher(self) -> bool:
        """Return whether the teacher is the small one of photos in this package."""
        return self.teacher is not None and self.teacher.name == PHOTO_TEACHER

    @property
    def is_dense(self) -> bool:
        """Return whether the student reads its teacher's tokens, so that it cannot be fitted to them."""
        return self.model is not None and self.bare_model.config.trigger_source == "tokens"

    @property
    def embedding_source(self) -> str:
        """Whose embeddings [`APM.encode`] gives by default: the student's, or the teacher's.

        They are the teacher's where there is no student, or a dense one beside its teacher: it adds detail to features
        of locations, and nothing to the embedding of an image, which the teacher has computed anyway.
        """
        return "teacher" if self.model is None or (self.is_dense and self.teacher is not None) else "student"

    @property
    def default_labels(self) -> list[str]:
        """Class names to begin with: a classifier's own, or those in a dual encoder's configuration (`id2label`)."""
        if self.teacher is None or self.teacher.class_names is not None:
            return [] if self.teacher is None else list(self.teacher.class_names or ())
        names = getattr(getattr(self.teacher.model, "config", None), "id2label", None) or {}
        # Without names of its own, a configuration has LABEL_0 and LABEL_1.
        return (
            [] if any(name == f"LABEL_{row}" for row, name in names.items()) else [names[row] for row in sorted(names)]
        )

    def identity(self) -> dict[str, Any]:
        """Return what decides the student's outputs: configuration, weights' digest, image processor's options."""
        model = self._needed_model()
        fields = {**model.config.to_diff_dict(), "_name_or_path": None, "transformers_version": None}
        return {
            "config": json.loads(json.dumps(fields, default=str)),
            "weights": weights_digest(model),
            "image_processor": processor_settings(self.image_processor),
        }

    def pixel_values(self, images: Any) -> Tensor:
        """Return `(B, C, S, S)` on the student's device: whole images, squeezed into its square."""
        model, side = self._needed_model(), self._needed_model().config.image_size
        return whole_photos(self.image_processor, pictures(images), (side, side)).to(model.device)

    @property
    def feature_size(self) -> int:
        """F, of the student or, alone, of the teacher."""
        if self.model is not None:
            return self.model.config.feature_size
        return self._needed_teacher("to compute features with").feature_size

    def trigger_column(self, images: Any, pixel_values: Tensor | None = None) -> Tensor | None:
        """Return the trigger column that the student takes from its teacher; None for one that computes its own.

        Args:
            images: see the class.
            pixel_values: what [`APM.pixel_values`] returned for them, if it was called already.

        Returns:
            The teacher's embeddings `(B, D)`; or its tokens `(B, rows, cols, F)`, of the teacher inside the student or
            of the one beside it; or None.

        Raises:
            ValueError: where they are needed and there is no teacher.
        """
        config = self.bare_model.config
        if config.folds_pixels:
            return None
        if config.trigger_source == "tokens":
            return self._tokens(self.pixel_values(images) if pixel_values is None else pixel_values)
        teacher = self._needed_teacher("that this student takes its trigger columns from")
        return teacher.encode_images(pictures(images)).image_embeds

    def _tokens(self, pixel_values: Tensor) -> Tensor | None:
        """Return the tokens that a dense student reads, of the teacher inside or beside it; None for others."""
        model = self.bare_model
        if model.config.trigger_source != "tokens":
            return None
        if model.folds:
            with torch.no_grad():
                return model.fold(pixel_values)
        return tokens_at_half(self._needed_teacher("that this student takes its trigger columns from"), pixel_values)

    def encode(
        self, images: Any, *, batch_size: int = 32, normalize: bool = False, source: str | None = None
    ) -> Tensor:
        """Return one embedding per image, `(B, F)` float32 on the CPU.

        Args:
            images: see the class.
            batch_size: images per batch.
            normalize: whether embeddings are scaled to length 1.
            source: `"student"` or `"teacher"`; by default as [`APM.embedding_source`].

        Raises:
            ValueError: for an unreadable image, or a source that was not loaded.
        """
        preprocessing = self.preprocessing(source)
        embeds = [
            self.embed({name: prepare(batch) for name, prepare in preprocessing.items()}, source=source)
            for batch in _batches(images, batch_size)
        ]
        result = torch.cat(embeds)
        return torch.nn.functional.normalize(result, dim=1) if normalize else result

    def preprocessing(self, source: str | None = None) -> dict[str, Callable[[list[Image.Image]], Tensor]]:
        """Return functions that make inputs of [`APM.embed`] of photos, by name; they can be sent to worker processes.

        Args:
            source: as in [`APM.encode`].

        Raises:
            ValueError: for a source that was not loaded.
        """
        if self._source(source or self.embedding_source) == "teacher":
            teacher = self._needed_teacher("to compute embeddings with")
            return {"teacher_pixel_values": partial(process, teacher.image_processor)}
        needed: dict[str, Any] = {"pixel_values": partial(process, self.image_processor)}
        if self.bare_model.folds:
            return needed
        teacher = self._needed_teacher("that this student takes its trigger columns from")
        if self.bare_model.config.trigger_source == "embedding":
            needed["teacher_pixel_values"] = partial(process, teacher.image_processor)
        return needed

    def embed(self, inputs: Mapping[str, Tensor], *, source: str | None = None) -> Tensor:
        """Return the embeddings of prepared photos, `(B, F)` float32 on the CPU.

        Args:
            inputs: as [`APM.preprocessing`] makes them for this source.
            source: as in [`APM.encode`].
        """
        output, column = None, None
        if (pixels := inputs.get("teacher_pixel_values")) is not None:
            output = self._needed_teacher("to compute embeddings with").encode_images(pixel_values=pixels)
        if self._source(source or self.embedding_source) == "teacher":
            assert output is not None and output.image_embeds is not None
            return output.image_embeds.float().cpu()
        model = self.bare_model
        pixel_values = inputs["pixel_values"].to(model.device)
        column = self._tokens(pixel_values) if output is None else output.image_embeds
        with torch.inference_mode():
            embeds = model.pooled_features(pixel_values, trigger_column=column)
        return embeds.float().cpu()

    def encode_dense(
        self,
        images: Any,
        *,
        size: int | tuple[int, int] | None = None,
        coordinates: Tensor | None = None,
        batch_size: int = 8,
        source: str | None = None,
    ) -> Tensor:
        """Return features of locations, float32 on the CPU, of complete images: none is cropped.

        A student is queried at each location. A teacher's grid is interpolated bilinearly.

        Args:
            images: see the class.
            size: (rows, cols) of a map, or the number of locations along the longer side of a map in the images'
                shape; by default the source's own grid.
            coordinates: `(L, 2)`, (y, x), instead of a map; of a student.
            batch_size: images per batch.
            source: `"student"` or `"teacher"`; by default the student where there is one.

        Returns:
            `(B, rows, cols, F)`, or `(B, L, F)` for coordinates.

        Raises:
            ValueError: for size and coordinates at once, one number for images of different shapes, coordinates of a
                teacher, and as [`APM.encode`].
        """
        if size is not None and coordinates is not None:
            raise ValueError("size, coordinates: expected one of them, got both")
        source, features, where = self._source(source), [], None
        for batch in _batches(images, batch_size):
            here = _map_size(batch, size)
            where = where or here
            if here != where:
                raise ValueError(f"size: expected (rows, cols) for images of different shapes, got {size}")
            if source == "teacher":
                if coordinates is not None:
                    raise ValueError("coordinates: expected a student to query, got a teacher alone")
                grid = teacher_features(self._needed_teacher("to compute features with"), batch, fine=False)
                values = grid if where is None else upsample(grid, where)
            else:
                pixel_values = self.pixel_values(batch)
                column = self.trigger_column(batch, pixel_values)
                model = self.bare_model
                if coordinates is not None:
                    outputs = query(model, pixel_values, coordinates, trigger_column=column).last_hidden_state
                    assert outputs is not None
                    values = outputs
                else:
                    side = model.config.grid_size
                    values = query_map(model, pixel_values, where or (side, side), trigger_column=column)[0]
            features.append(values.float().cpu())
        return torch.cat(features)

    def classifier(
        self,
        labels: Sequence[str],
        *,
        config: TTTConfig | None = None,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
    ) -> TTTClassifier:
        """Return a classifier that adapts to every image; the labels are encoded once.

        Args:
            labels: K class names that the teacher knows.
            config: how to adapt; by default the preset `fast`, from the student's weights or, where there is none or
                a dense one, which cannot be adapted, from random ones.
            templates: prompts with `{}` for the name, averaged.

        Raises:
            ValueError: without a teacher, or for names that it does not know.
        """
        teacher = self._needed_teacher("to encode the labels with")
        alone = self.model is None or self.is_dense
        config = config or TTTConfig.preset("fast", start="model")
        return TTTClassifier(
            teacher,
            labels,
            config=replace(config, start="random") if alone else config,
            model=None if alone else self.model,
            image_processor=None if alone else self.image_processor,
            templates=templates,
        )

    def classify(self, images: Any, labels: Sequence[str], **options: Any) -> TTTClassification:
        """Adapt the student to each image and classify it zero-shot, the teacher's own scores beside.

        A student that is fitted to the end repeats its teacher, mistakes included.

        Args:
            images: see the class.
            labels: K class names.
            **options: of [`APM.classifier`].

        Returns:
            Logits `(B, K)` of teacher and student, and how close the fits came.
        """
        return self.classifier(labels, **options)(pictures(images))

    def islands(self, image: Any, *, heights: Sequence[int] = DEFAULT_HEIGHTS, size: int = 64) -> Islands:
        """Find the islands of agreement of one image: neighbouring locations whose features agree.

        Args:
            image: one, see the class.
            heights: numbers of regions, ascending.
            size: locations along the longer side of the map, at most `MAX_TREE_SIZE`.

        Raises:
            ValueError: for more regions than locations, or heights that do not ascend.
        """
        from ..islands import RegionTree

        if not 1 <= size <= MAX_TREE_SIZE:
            raise ValueError(f"size: expected 1 to {MAX_TREE_SIZE} locations along the longer side, got {size}")
        if not heights or min(heights) < 1 or list(heights) != sorted(set(heights)):
            raise ValueError(f"heights: expected ascending numbers of regions, got {list(heights)}")
        features = self.encode_dense(image, size=size)
        if len(features) != 1:
            raise ValueError(f"image: expected one, got {len(features)}")
        num_locations = features.shape[1] * features.shape[2]
        if heights[-1] > num_locations:
            raise ValueError(f"heights: expected at most {num_locations} regions, one a location, got {heights[-1]}")
        tree = RegionTree.fit(features[0])
        regions = torch.stack([torch.as_tensor(cut) for cut in tree.cuts(list(heights))])
        return Islands(features[0], tuple(heights), regions.long(), tree)

    def fit(
        self,
        images: Any,
        *,
        steps: int = FIT_STEPS,
        seed: int = 0,
        on_step: Callable[[int, APMModel], None] | None = None,
    ) -> "APM":
        """Return the pair with a copy of its student fitted to the teacher's features of these images.

        One image is fitted by test-time training. Several are distilled together, so that their trigger columns tell
        them apart; they are resized to the first one's shape.

        Args:
            images: see the class.
            steps: gradient steps.
            seed: random seed of the locations.
            on_step: called before each update with its number and the student as it then is; for one image.

        Raises:
            ValueError: without student or teacher, for a dense student, or where the fit diverges.
            ImportError: for several images without accelerate; says what to install.
        """
        photos, teacher, model = pictures(images), self._needed_teacher("to fit a student to"), self._needed_model()
        if self.is_dense:
            raise ValueError("model: expected one that can be fitted, got a dense one; fit a fresh one: fresh().fit()")
        model, pixel_values = bare_model(model), self.pixel_values(photos)
        features = teacher_features(teacher, photos, fine=not self.is_fitted)
        if len(photos) > 1:
            from .several_photos import fit_photos

            if on_step is not None:
                raise ValueError("on_step: expected one image, got several")
            fitted = fit_photos(model, pixel_values, features, self.image_processor, steps=steps, seed=seed)
        else:
            rows, cols = features.shape[1:3]
            fitted = fit_photo(
                model,
                pixel_values,
                features,
                photo_colours(photos[0], (rows, cols)) if model.config.use_rgb_head else None,
                steps=steps,
                trigger_column=self.trigger_column(photos),
                seed=seed,
                on_step=on_step,
            )
        return replace(self, model=fitted, is_fitted=True)

    def _source(self, source: str | None) -> str:
        if source not in (None, "student", "teacher"):
            raise ValueError(f"source: expected 'student' or 'teacher', got {source!r}")
        return source or ("teacher" if self.model is None else "student")

    def _needed_model(self) -> APMPreTrainedModel:
        if self.model is None:
            raise ValueError("expected a student, got a teacher alone: load a model too, or call fresh() and fit()")
        return self.model

    def _needed_teacher(self, what_for: str) -> Teacher:
        if self.teacher is None:
            raise ValueError(f"teacher: expected one {what_for}, got none; pass teacher= to APM.load")
        return self.teacher


def pictures(images: Any) -> list[Image.Image]:
    """Return upright 8-bit RGB pictures of one image or many, of any kind that the class [`APM`] takes.

    Raises:
        ValueError: for none, or for what is no image, with its path or index.
    """
    if isinstance(images, str | os.PathLike):
        return [read_rgb(images)]
    if isinstance(images, list | tuple):
        images = [read_rgb(image) if isinstance(image, str | os.PathLike) else image for image in images]
    return rgb_images(images)


def _batches(images: Any, batch_size: int) -> Iterator[list[Image.Image]]:
    """Read images batch by batch, so that a long list of paths never lies in memory as a whole."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
    many: Sequence[Any] = images if isinstance(images, list | tuple) else pictures(images)
    if not many:
        raise ValueError("images: expected at least one, got none")
    for start in range(0, len(many), batch_size):
        yield pictures(many[start : start + batch_size])


def _teacher_digest(config: APMConfig) -> str | None:
    """Return the SHA-256 of the weights of the teacher that a student was made for, inside or beside it.

    None where it is not known, and for a student of several teachers, any of which may stand beside it.
    """
    if config.teacher_source is not None:
        return config.teacher_source["sha256"]
    origins = config.distilled_from or []
    return origins[0].get("sha256") if len(origins) == 1 else None


def _map_size(photos: list[Image.Image], size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if not isinstance(size, int):
        return size
    if size < 1:
        raise ValueError(f"size: expected a positive number, got {size}")
    sizes = {map_size(photo, size) for photo in photos}
    if len(sizes) > 1:
        raise ValueError(f"size: expected (rows, cols) for images of different shapes, got {size}")
    return sizes.pop()
