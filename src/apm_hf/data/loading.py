"""Image datasets from the Hub or the disk.

A dataset is named as `org/name`, `org/name:config`, a folder of images, of parquet shards or of WebDataset's tar
shards, some such shards (`shards/*.tar`, `hf://datasets/org/name/*.tar`), or a folder written by `save_to_disk`.
Splits, image and label columns and class names are found from the dataset's own description
(https://huggingface.co/docs/datasets/v4.0.0/en/about_dataset_features); what is missing or ambiguous is a ValueError
naming the flag that settles it. Images stay encoded until `apm_hf.data.images.decode_image`, so that a damaged file is
reported with its row instead of failing inside `datasets`, which the extra `apm_hf[train]` installs.
"""

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from transformers.utils import logging

from .folders import DescribedFolder, ListedFolder, list_images
from .images import decode_image, eight_bit_rgb

logger = logging.get_logger(__name__)

VALIDATION_SPLITS = ("validation", "val", "valid", "dev", "test", "eval")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "class_id", "target", "category")
CLASS_NAME_COLUMNS = ("name", "class_name", "label_name")
WORDNET_ID = re.compile(r"^n\d{8}[_ -]+(?=.)")  # ImageNet's folder names: n01440764_tench
FILES = {".parquet": "parquet", ".tar": "webdataset"}  # file -> the builder of `datasets` that reads it
STREAM_SHARDS = 64  # of a folder of images: parts that processes share out
SHUFFLE_BUFFER_SIZE = 1_000  # rows a stream keeps in memory, still encoded, to draw from


@dataclass(frozen=True)
class ImageData:
    """One split of an image dataset.

    Attributes:
        dataset: a `datasets.Dataset`, or an `IterableDataset` when streaming. Its image columns are not decoded:
            a row holds `{"bytes": ..., "path": ...}` for [`decode_image`].
        image_column: the column with the images.
        label_column: the integer column with the labels, if there is one.
        class_names: the name of every label, if the dataset has them.
        split: the split's name; a held-out part reads `"train[held out]"` and its rest `"train[rest]"`.
    """

    dataset: Any
    image_column: str
    label_column: str | None
    class_names: list[str] | None
    split: str

    def photo(self, row: int) -> Any:
        """Return one image, upright, 8-bit RGB.

        Raises:
            ValueError: for an image that cannot be read; names the row.
        """
        try:
            return eight_bit_rgb(decode_image(self.dataset[row][self.image_column]))
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error

    def photos(self) -> list[Callable[[], Any]]:
        """Return a function for every image, which reads it."""
        return [partial(self.photo, row) for row in range(len(self.dataset))]

    def require_labels(self) -> str:
        """The label column, or a ValueError for callers that cannot do without."""
        if self.label_column is None:
            raise ValueError(
                f"found no labels among the columns {list(self.dataset.features)} of split {self.split!r}: labelled "
                "images lie in a folder for each class, or beside a column of integers"
            )
        return self.label_column


def load_images(
    name_or_path: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    max_images: int | None = None,
    revision: str | None = None,
    seed: int | None = None,
) -> ImageData:
    """Load one split of an image dataset.

    Args:
        name_or_path: a Hub name, optionally with `:config`, or a local folder, or parquet or tar files, which may be a
            pattern or lie on the Hub (`hf://...`).
        split: which split, slices such as `"train[:10%]"` included; by default the only one, or else `train`.
        image_column: by default the only column of type `Image` (or of encoded images, where no column has that type).
        label_column: by default the column of type `ClassLabel` or integer called `label`, `labels`, `fine_label`,
            `class`, `class_id`, `target` or `category`, the first that is there, or else the only `ClassLabel`.
        streaming: read rows as they are needed instead of downloading and preparing the whole dataset first.
        max_images: keep this many images: the first ones, or a random subset if `seed` is given.
        revision: branch, tag or commit of a Hub dataset.
        seed: of the random subset; without `max_images` the order is the dataset's own. A stream draws from a buffer
            of its next 1,000 rows.

    Raises:
        ValueError: an unknown split or column, or several candidates; the message lists them and names the flag.
        FileNotFoundError: a path where there is nothing.
        ImportError: `datasets` is not installed.
    """
    source = Source.parse(name_or_path, revision, split=split)
    split = source.choose_split(split)
    data = _describe(source.load(split, streaming), split, image_column, label_column)
    return _limit(data, max_images, seed)


def train_and_validation(
    name_or_path: str | os.PathLike[str],
    *,
    split: str | None = None,
    validation_split: str | None = None,
    validation_fraction: float = 0.05,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    max_images: int | None = None,
    max_validation_images: int | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> tuple[ImageData, ImageData]:
    """Load the images to train on and those to validate on.

    Validation uses `validation_split`, or else the first split called `validation`, `val`, `valid`, `dev`, `test` or
    `eval`. Without any, `validation_fraction` of the training split is held out: rows drawn with `seed`, or the first
    rows of a stream. Which it was is logged. The other arguments are those of [`load_images`]; `seed` also draws
    the subsets of `max_images` and `max_validation_images`, after the split is made.
    """
    source = Source.parse(name_or_path, revision, split=split or validation_split)
    split = source.choose_split(split)
    if validation_split is None:
        used = {part.split("[")[0] for part in split.split("+")}  # "train[:90%]+test" uses both
        unused = [name for name in VALIDATION_SPLITS if name in source.split_names and name not in used]
        validation_split = unused[0] if unused else None
    else:
        validation_split = source.choose_split(validation_split, flag="--validation_split")
    train = _describe(source.load(split, streaming), split, image_column, label_column)
    if validation_split is None:
        train, validation = _hold_out(train, validation_fraction, seed)
    else:
        logger.info(f"{source.name}: training on split {split!r}, validating on split {validation_split!r}.")
        dataset = source.load(validation_split, streaming)
        validation = _describe(dataset, validation_split, train.image_column, train.label_column)
    return _limit(train, max_images, seed), _limit(validation, max_validation_images, seed)


@dataclass(frozen=True)
class Source:
    """Describe where a data set lies and how it is read: by `datasets`, or as a listed or described folder."""

    name: str
    path: str
    config: str | None = None
    data_files: dict[str, str] | None = None
    revision: str | None = None
    saved_to_disk: bool = False
    listed: ListedFolder | None = None
    described: DescribedFolder | None = None

    @classmethod
    def parse(
        cls, name_or_path: str | os.PathLike[str], revision: str | None, *, split: str | None = None
    ) -> "Source":
        """Find out what a name means.

        Args:
            split: one that is asked for, see [`list_images`].
        """
        name = os.fspath(name_or_path)
        if not name.strip():
            raise ValueError(f"dataset: expected a folder, a parquet file or a Hub name, got {name!r}")
        path, config = os.path.expanduser(name), None
        if not os.path.exists(path) and ":" in path and "://" not in path:
            path, _, config = path.rpartition(":")
        builder = FILES.get(os.path.splitext(path)[1])
        if builder and (os.path.isfile(path) or "://" in path or glob.has_magic(path)):
            if "://" not in path and not glob.glob(path):
                raise FileNotFoundError(f"there is no file {name!r}.")
            word = re.split(r"\W|_", os.path.basename(path))[0]  # shards are called train-00000-of-00001.parquet
            pattern = glob.escape(path) if os.path.isfile(path) else path
            return cls(name, builder, data_files={word if word in VALIDATION_SPLITS else "train": pattern})
        if os.path.isfile(path):
            raise ValueError(f"expected a folder, a parquet file, a tar file or a Hub name, got the file {name!r}.")
        if os.path.isdir(path):
            marks = ("dataset_dict.json", "state.json")
            saved_to_disk = any(os.path.isfile(os.path.join(path, mark)) for mark in marks)
            listed = None if saved_to_disk or config else list_images(path, split=(split or "").split("[")[0] or None)
            if isinstance(listed, DescribedFolder):
                return cls(name, "imagefolder", data_files=listed.data_files(), described=listed)
            return cls(name, path, config, saved_to_disk=saved_to_disk, listed=listed)
        if path.startswith((".", os.sep)) or path.count("/") > 1:
            raise FileNotFoundError(f"there is no file or folder {name!r}.")
        return cls(name, path, config, revision=revision)

    @cached_property
    def split_names(self) -> list[str]:
        """The names of all splits."""
        datasets = import_datasets()
        if self.listed is not None:
            return list(self.listed.splits)
        if self.saved_to_disk:
            return list(self._load_saved())
        with self._explained():
            return datasets.get_dataset_split_names(
                self.path, self.config, data_files=self.data_files, revision=self.revision
            )

    def choose_split(self, split: str | None, flag: str = "--split") -> str:
        """Return the split to read: the one given, else the only one or `train`; a ValueError lists them otherwise."""
        names = self.split_names
        if split is None and (len(names) == 1 or "train" in names):
            return names[0] if len(names) == 1 else "train"
        parts = [part if self.saved_to_disk else part.split("[")[0] for part in (split or "").split("+")]
        if split is None or not set(parts) <= set(names):
            wanted = "several splits" if split is None else f"no split {split!r}"
            raise ValueError(f"{self.name} has {wanted}; choose one of {names} with {flag}.")
        return split

    def load(self, split: str, streaming: bool) -> Any:
        """Open a split, as a table or as a stream."""
        if self.listed is not None and not (streaming and split not in self.split_names):
            return self._load_listed(self.listed, split, streaming)
        if self.saved_to_disk:
            dataset = self._load_saved()[split]
            return dataset.to_iterable_dataset() if streaming else dataset
        if streaming and split not in self.split_names:
            raise ValueError(
                f"a stream has no parts or sums of splits, got {split!r}; choose one of {self.split_names}."
            )
        with self._explained():
            dataset = import_datasets().load_dataset(
                self.path,
                self.config,
                data_files=self.data_files,
                split=split,
                revision=self.revision,
                streaming=streaming,
            )
        if self.described is not None and split in self.split_names and not streaming:
            self.described.say_left_out(split, dataset)
        return dataset

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of `datasets` and of the libraries below it, with the data set's name and the first cause's words."""
        try:
            yield
        except OSError as error:
            if self.name in str(error):
                raise
            raise type(error)(f"{self.name}: {error}") from error
        except (ValueError, import_datasets().exceptions.DatasetsError) as error:
            if re.search("Config name is missing|BuilderConfig", str(error)):
                configs = " ".join(str(error).split())
                raise ValueError(f"{configs}; write {self.path}:CONFIG to choose one.") from error
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if "BatchSize must be greater than 0" in str(cause):  # pyarrow's words
                raise ValueError(f"{self.name}: expected at least one image, got none") from error
            raise ValueError(f"{self.name}: cannot be read as an image data set: {str(cause)[:500]}") from error

    @staticmethod
    def _load_listed(listed: ListedFolder, split: str, streaming: bool) -> Any:
        datasets = import_datasets()
        lengths = {name: len(paths) for name, paths in listed.splits.items()}
        parts = [
            listed.dataset(part.splitname).select(
                range(part.from_ or 0, lengths[part.splitname] if part.to is None else part.to)
            )
            for part in datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
        ]
        dataset = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        return dataset.to_iterable_dataset(num_shards=min(len(dataset), STREAM_SHARDS)) if streaming else dataset

    def _load_saved(self) -> dict[str, Any]:
        with self._explained():
            dataset = import_datasets().load_from_disk(self.path)
        return dataset if isinstance(dataset, dict) else {str(dataset.split or "train"): dataset}


def import_datasets() -> Any:
    """Import and return the package `datasets`; an ImportError says what to install."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError('loading datasets needs the package `datasets`: pip install "apm_hf[train]"') from error
    return datasets


def _describe(dataset: Any, split: str, image_column: str | None, label_column: str | None) -> ImageData:
    """Find the columns and the class names of a dataset, and leave its images encoded."""
    datasets = import_datasets()
    features = dataset.features
    if features is None:
        raise ValueError("this dataset does not say its columns' types while streaming; load it without --streaming.")
    if isinstance(dataset, datasets.Dataset) and not len(dataset):
        raise ValueError(f"split {split!r}: expected at least one image, got none")
    image_column = _find_image_column(features, image_column)
    label_column = _find_label_column(features, label_column)
    if not isinstance(dataset, datasets.Dataset):
        dataset = dataset.decode(False)  # a stream from the Hub comes with threads that decode, casts or not
    for column, feature in features.items():
        if column == image_column or isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    class_names = None if label_column is None else _find_class_names(dataset, label_column)
    return ImageData(dataset, image_column, label_column, class_names, split)


def _find_image_column(features: Mapping[str, Any], column: str | None) -> str:
    datasets = import_datasets()
    is_image = {name for name, feature in features.items() if isinstance(feature, datasets.Image)}
    # Parquet files from other tools hold encoded images without saying so.
    is_encoded = {
        name
        for name, feature in features.items()
        if (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
        or getattr(feature, "dtype", None) in ("binary", "large_binary")
    }
    if column is not None:
        is_path = getattr(features.get(column), "dtype", None) in ("string", "large_string")
        if column in is_image | is_encoded or is_path:
            return column
        problem = f"cannot read images from column {column!r}" if column in features else f"no column {column!r}"
        raise ValueError(f"{problem}; the columns are {dict(features)}; name another with --image_column.")
    candidates = [name for name in features if name in (is_image or is_encoded)]
    if len(candidates) != 1:
        found = f"several image columns, {candidates}," if candidates else "no image column"
        raise ValueError(f"found {found} among {list(features)}; name one with --image_column.")
    return candidates[0]


def _find_label_column(features: Mapping[str, Any], column: str | None) -> str | None:
    class_labels = [name for name, feature in features.items() if isinstance(feature, import_datasets().ClassLabel)]
    integers = [name for name, feature in features.items() if re.match("u?int", getattr(feature, "dtype", None) or "")]
    if column is not None:
        if column in integers:
            return column
        problem = f"column {column!r} holds no integers" if column in features else f"no column {column!r}"
        raise ValueError(f"{problem}; integer columns are {integers}; name another with --label_column.")
    named = [name for name in LABEL_COLUMNS if name in integers]
    if not named and len(class_labels) > 1:
        raise ValueError(f"found several label columns, {class_labels}; name one with --label_column.")
    return next(iter(named or class_labels), None)


def _find_class_names(dataset: Any, label_column: str) -> list[str] | None:
    """The names of a `ClassLabel`, without WordNet ids; or those in a text column that has one name per label."""
    datasets = import_datasets()
    feature = dataset.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        return [WORDNET_ID.sub("", name) for name in feature.names]
    if not isinstance(dataset, datasets.Dataset):
        return None  # reading a whole stream for its names would be a hidden download
    for column in CLASS_NAME_COLUMNS:
        if getattr(dataset.features.get(column), "dtype", None) not in ("string", "large_string"):
            continue
        table = dataset.select_columns([label_column, column]).with_format("arrow")[:]
        pairs = table.group_by([label_column, column]).aggregate([]).to_pylist()
        names = {pair[label_column]: pair[column] for pair in pairs}
        if len(pairs) == len(names) and set(names) == set(range(len(names))) and None not in names.values():
            return [names[label] for label in range(len(names))]
    return None


def _limit(data: ImageData, max_images: int | None, seed: int | None) -> ImageData:
    if max_images is None:
        return data
    if max_images < 1:
        raise ValueError(f"expected at least one image, got max_images={max_images}.")
    dataset = data.dataset
    if isinstance(dataset, import_datasets().Dataset):
        order = np.arange(len(dataset)) if seed is None else np.random.default_rng(seed).permutation(len(dataset))
        return replace(data, dataset=_select(dataset, order[:max_images]))
    dataset = dataset if seed is None else dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER_SIZE)
    return replace(data, dataset=dataset.take(max_images))


def _select(dataset: Any, rows: np.ndarray) -> Any:
    # Not `shuffle` or `train_test_split`: they write the indices beside the data, into a saved folder of the user's.
    return dataset.select(np.sort(rows))


def _hold_out(data: ImageData, fraction: float, seed: int) -> tuple[ImageData, ImageData]:
    if not 0 < fraction < 1:
        raise ValueError(f"expected validation_fraction between 0 and 1, got {fraction}.")
    is_stream = not isinstance(data.dataset, import_datasets().Dataset)
    num_images = _stream_length(data) if is_stream else len(data.dataset)
    num_held_out = max(1, round(fraction * num_images))
    if num_held_out >= num_images:
        raise ValueError(f"cannot hold out {num_held_out} of {num_images} images; name a --validation_split.")
    if is_stream:
        rest, held_out = data.dataset.skip(num_held_out), data.dataset.take(num_held_out)
    else:
        order = np.random.default_rng(seed).permutation(num_images)
        held_out, rest = (_select(data.dataset, part) for part in np.split(order, [num_held_out]))
    which = "the first rows of the stream" if is_stream else f"drawn with seed {seed}"
    logger.info(f"no validation split: holding out {num_held_out} of {num_images} images of {data.split!r}, {which}.")
    return (
        replace(data, dataset=rest, split=f"{data.split}[rest]"),
        replace(data, dataset=held_out, split=f"{data.split}[held out]"),
    )


def _stream_length(data: ImageData) -> int:
    splits = data.dataset.info.splits or {}
    num_images = splits[data.split].num_examples if data.split in splits else None
    if not num_images:
        raise ValueError(
            f"split {data.split!r} does not say its length while streaming, so no part of it can be held out; "
            "name a --validation_split or load it without --streaming."
        )
    return num_images


__all__ = ["ImageData", "Source", "import_datasets", "load_images", "train_and_validation"]
