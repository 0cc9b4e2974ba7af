"""Load data sets with masks: images whose segments were annotated by people or by the program that drew them.

A mask assigns each pixel to a segment, at one of two levels: `whole` (objects, coarse segments) and `part` (their
parts, fine segments). A data set has one of them or both.

Legend: (H, W) an image's pixels.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from transformers.utils import logging

from ...data.images import decode_image, eight_bit_rgb
from ...data.loading import VALIDATION_SPLITS, Source, import_datasets
from ...data.scenes import PART_NAMES, SceneDataset
from ...modeling_apm import IGNORE_INDEX
from ...runs.files import plain_name, read_text
from ...runs.identity import images_digest
from ...runs.unreadable_images import check_limit

logger = logging.get_logger(__name__)

LEVELS = ("whole", "part")
VOID = -1  # label of ignored pixels, whatever their label in the data set
SCENES, NUM_SCENES, SCENE_SIZE = "scenes", 40, 96
IMAGE_COLUMNS = ("image", "img", "photo", "pixel_values")
MASK_COLUMNS = {
    "whole": ("whole_mask", "object_mask", "coarse_mask"),
    "part": ("part_mask", "fine_mask", "mask", "annotation", "segmentation_mask", "semantic_mask", "label_map"),
}
NAMES_FILE = "part_names.json"  # a list of the part labels' names, next to the data


@dataclass(frozen=True)
class MaskedImages:
    """Hold images and their masks, decoded on access.

    Args:
        name: name in file names and results.
        rows: N mappings.
        image_column: key of the image in a row.
        mask_columns: level -> key of its mask.
        class_names: names of the part labels 0, 1, ..., if they are the same in all images; else None.
        ignore_labels: labels, in either mask, of ignored pixels.
        map_size: default side of the methods' maps.
        source: additional facts that identify this data set.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    image_column: str
    mask_columns: Mapping[str, str]
    class_names: Sequence[str] | None
    ignore_labels: tuple[int, ...]
    map_size: int
    source: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def levels(self) -> list[str]:
        """Return the levels that have masks."""
        return [level for level in LEVELS if level in self.mask_columns]

    def image(self, index: int) -> PIL.Image.Image:
        """Return one image, upright, 8-bit RGB.

        Raises:
            ValueError: a damaged image; the message names the row.
        """
        try:
            return eight_bit_rgb(decode_image(self.rows[index][self.image_column]))
        except ValueError as error:
            raise ValueError(f"{self.name}, row {index}: {error}") from error

    def mask(self, index: int, level: str) -> NDArray[np.int32]:
        """Return a mask `(H, W)`: labels from 0, `VOID` for ignored pixels.

        Raises:
            ValueError: for an entry that is no mask, or labels without a class name; the message names the row.
        """
        column = self.mask_columns[level]
        where = f"{self.name}, row {index}, column {column!r}"
        try:
            labels = _read_mask(self.rows[index][column])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        labels = np.where(np.isin(labels, self.ignore_labels), VOID, labels)
        if level == "part" and self.class_names is not None and labels.max() >= len(self.class_names):
            raise ValueError(
                f"{where}: expected labels below {len(self.class_names)}, the number of class names, "
                f"got {labels.max()}"
            )
        return labels

    def unreadable(self) -> dict[int, str]:
        """Return the rows whose image or masks cannot be read, and the reasons."""
        found = {}
        for index in range(len(self)):
            try:
                self._count_segments(index)
            except ValueError as error:
                found[index] = str(error)
        return found

    def without(self, rows: Collection[int]) -> "MaskedImages":
        """Return the data set without these rows."""
        remaining = [index for index in range(len(self)) if index not in rows]
        select = getattr(self.rows, "select", None)
        left = [self.rows[index] for index in remaining] if select is None else select(remaining)
        return replace(self, rows=left, source={**self.source, "without": sorted(rows)})

    @cached_property
    def num_segments(self) -> dict[str, list[int]]:
        """Count segments: level -> number of segments in every image's mask.

        Raises:
            ValueError: for a mask that is not as large as its image; the message names the row.
        """
        rows = [self._count_segments(index) for index in range(len(self))]
        return {level: [row[level] for row in rows] for level in self.levels}

    def _count_segments(self, index: int) -> dict[str, int]:
        size, counts = self.image(index).size, {}
        for level in self.levels:
            mask = self.mask(index, level)
            if mask.shape[::-1] != size:
                raise ValueError(
                    f"{self.name}, row {index}, column {self.mask_columns[level]!r}: expected a mask of the "
                    f"image's {size[0]} x {size[1]} pixels, got {mask.shape[1]} x {mask.shape[0]}"
                )
            counts[level] = len(np.setdiff1d(mask, VOID))
        return counts

    def digest(self) -> str:
        """Return the SHA-256 of the images' and masks' contents; for drawn scenes, of their parameters."""
        if isinstance(self.rows, SceneDataset):
            return hashlib.sha256(json.dumps(dict(self.source)).encode()).hexdigest()
        columns = (self.image_column, *self.mask_columns.values())
        return hashlib.sha256("".join(images_digest(self.rows, column) for column in columns).encode()).hexdigest()

    def check(self) -> None:
        """Check all masks before anything is computed.

        Raises:
            ValueError: for too few images for the controls, an unreadable mask, or masks of one segment only.
        """
        if len(self) < 4:
            raise ValueError(f"{self.name}: expected 4 images or more, since controls exchange them, got {len(self)}")
        for level, counts in self.num_segments.items():
            if max(counts) < 2:
                raise ValueError(
                    f"{self.name}: expected {level} masks of two segments or more, got none in column "
                    f"{self.mask_columns[level]!r} once the labels {list(self.ignore_labels)} are ignored "
                    "(--ignore_labels)"
                )


def load_masked_images(
    name_or_path: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_column: str | None = None,
    mask_columns: Mapping[str, str] | None = None,
    ignore_labels: Sequence[int] = (IGNORE_INDEX,),
    max_images: int | None = None,
    seed: int = 0,
) -> list[MaskedImages]:
    """Load one data set with masks, or all of a folder.

    Args:
        name_or_path: `"scenes"`, drawn from stream `seed + 1`, since the embedded models were trained on stream 0; a
            folder, a parquet file or a Hub name; or a folder that holds several such folders.
        split: by default the only one, or else the first of test, validation, ...
        image_column: by default the first of `IMAGE_COLUMNS` that exists.
        mask_columns: level -> column; by default those of `MASK_COLUMNS` that exist.
        ignore_labels: labels of ignored pixels.
        max_images: a random subset of this size, drawn with `seed`; of scenes, the first (`NUM_SCENES` by default).
        seed: random seed of scenes and of the subset.

    Raises:
        ValueError: for missing columns or splits, or no masks; the message names the flag to set.
        FileNotFoundError: for a path that does not exist.
        ImportError: `datasets` is not installed.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images: expected at least 1, got {max_images}")
    ignored = tuple(ignore_labels)
    if os.fspath(name_or_path) == SCENES:
        return [_scenes(max_images or NUM_SCENES, ignored, seed)]
    return [
        _load(place, split, image_column, mask_columns, ignored, max_images, seed) for place in _places(name_or_path)
    ]


def without_unreadable(sets: Sequence[MaskedImages], limit: int) -> tuple[list[MaskedImages], list[dict[str, Any]]]:
    """Return the data sets without unreadable rows, and records of those rows.

    Raises:
        ValueError: for more unreadable rows than the limit.
    """
    if not limit:
        return list(sets), []  # the first unreadable row stops the run
    good: list[MaskedImages] = []
    skipped: list[dict[str, Any]] = []
    for found in sets:
        bad = found.unreadable()
        skipped += [{"data": found.name, "image": row, "reason": reason} for row, reason in bad.items()]
        good.append(found.without(bad) if bad else found)
    for line in skipped:
        logger.warning(f"skipped {line['reason']}")
    check_limit([line["reason"] for line in skipped], limit)
    return good, skipped


def _scenes(num_scenes: int, ignored: tuple[int, ...], seed: int) -> MaskedImages:
    stream = SceneDataset(num_scenes, seed=seed + 1, image_size=SCENE_SIZE)
    return MaskedImages(
        name=SCENES,
        rows=[stream[index] for index in range(num_scenes)],
        image_column="image",
        mask_columns={"whole": "whole_mask", "part": "part_mask"},
        class_names=PART_NAMES,
        ignore_labels=ignored,
        map_size=SCENE_SIZE,
        source={"stream": seed + 1},
    )


def _load(
    place: str,
    split: str | None,
    image_column: str | None,
    mask_columns: Mapping[str, str] | None,
    ignored: tuple[int, ...],
    max_images: int | None,
    seed: int,
) -> MaskedImages:
    source = Source.parse(place, None)
    if split is None:
        found = [name for name in ("test", *VALIDATION_SPLITS) if name in source.split_names]
        split = found[0] if found else None
    dataset = source.load(source.choose_split(split), streaming=False)
    features = dataset.features
    image_column = _choose(features, place, "image", image_column, IMAGE_COLUMNS)
    if image_column is None:
        raise ValueError(f"{place}: found no image column among {list(features)}; name one with --image_column")
    chosen = {
        level: _choose(features, place, f"{level} mask", (mask_columns or {}).get(level), MASK_COLUMNS[level])
        for level in LEVELS
        if not mask_columns or level in mask_columns
    }
    columns = {level: column for level, column in chosen.items() if column is not None}
    if not columns:
        raise ValueError(
            f"{place}: found no column with masks among {list(features)}; "
            "name one with --masks whole=COLUMN part=COLUMN"
        )
    for column in (image_column, *columns.values()):  # decoded by us, so that errors name the row
        if isinstance(features[column], import_datasets().Image):
            dataset = dataset.cast_column(column, import_datasets().Image(decode=False))
    if max_images is not None:
        dataset = dataset.select(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:max_images]))
    return MaskedImages(
        name=plain_name(Path(place).resolve().stem if os.path.exists(place) else place),
        rows=dataset,
        image_column=image_column,
        mask_columns=columns,
        class_names=_class_names(place),
        ignore_labels=ignored,
        map_size=112,
        source={"split": split, "fingerprint": dataset._fingerprint},
    )


def _places(name_or_path: str | os.PathLike[str]) -> list[str]:
    """Expand a folder of data sets to its subfolders; return anything else as the only entry."""
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if not path.is_dir() or any(entry.suffix in (".parquet", ".json", ".jsonl", ".csv") for entry in path.iterdir()):
        return [name]
    inside = [
        folder
        for folder in sorted(path.iterdir())
        if folder.is_dir()
        and folder.name not in ("data", "train", *VALIDATION_SPLITS)
        and any(folder.glob("*.parquet"))
    ]
    return [str(folder) for folder in inside] or [name]


def _choose(features: Mapping[str, Any], place: str, what: str, given: str | None, known: Sequence[str]) -> str | None:
    if given is not None and given not in features:
        raise ValueError(f"{place}: expected a column with the {what}, one of {list(features)}, got {given!r}")
    return given or next((name for name in known if name in features), None)


def _class_names(place: str) -> list[str] | None:
    path = Path(place).expanduser()
    file = (path if path.is_dir() else path.parent) / NAMES_FILE
    if not file.exists():
        return None
    try:
        names = json.loads(read_text(file, "names"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: expected a list of names, one per label from 0")
    return names


def _read_mask(value: Any) -> NDArray[np.int32]:
    if isinstance(value, list | np.ndarray):
        labels = np.asarray(value)
    else:
        labels = np.asarray(decode_image(value))  # a palette image gives indices, not colours
    if labels.ndim != 2 or labels.dtype.kind not in "iub":
        raise ValueError(f"expected a mask, one integer per pixel, got {labels.dtype} of shape {labels.shape}")
    if labels.dtype.kind == "i" and labels.min() < 0:
        raise ValueError(f"expected labels from 0, got {labels.min()}")
    return labels.astype(np.int32)


__all__ = ["LEVELS", "SCENES", "VOID", "MaskedImages", "load_masked_images"]
