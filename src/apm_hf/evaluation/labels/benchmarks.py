"""Load labelled images to evaluate on: the paper's benchmarks by name, any other data set by its path.

Hub ids, splits, columns and codings were looked up in public cards and code; entries that could not be confirmed have
`confirmed=False` and warn. The test splits are those of the Hub's data sets. Papers after CoOp (arXiv:2109.01134) use
its authors' splits for the fine-grained sets, which differ if `note` says so. The -C sets are the clean ones, to be
corrupted by the caller. A local copy is `load_benchmark("imagenet_a", data="/path")`.

Legend: N images, K classes.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
from transformers.utils import logging

from ...data.corruptions import CORRUPTION_NAMES
from ...data.images import decode_image, eight_bit_rgb
from ...data.loading import CLASS_NAME_COLUMNS, VALIDATION_SPLITS, ImageData, Source, load_images
from ...data.scenes import CLASS_NAMES, SceneDataset
from ...runs.identity import images_digest
from ...teachers import DEFAULT_TEMPLATES, first_five
from ...teachers.zero_shot import ENSEMBLE_TEMPLATES
from .label_maps import Labels, NameOptions, build_label_map, lacks_names, read_class_names

logger = logging.get_logger(__name__)

Constants = Literal["imagenet", "cifar"]
NAME_FILES = ("classnames.txt", "README.txt", "LOC_synset_mapping.txt")  # CLIP benchmark, ImageNet-A and -R, Kaggle
TEXT = ("string", "large_string")
NUM_SCENES = 1_000
SMALL_SIDE = 48  # images below it get CIFAR's constants by default


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Describe where a benchmark's images are found and how they are used.

    Args:
        name, title: name in result files and title in tables.
        hub_id, config, split, revision: arguments of `datasets.load_dataset`; no id if the Hub has no loadable copy.
        image_column, label_column: columns on the Hub; None is detected. In a user's copy they are detected, too.
        templates, ensemble_templates: prompts, one and many.
        label_map: how names become words, and where they are if not with the labels.
        constants: constants of the corruptions.
        corruptions: corruptions that belong to the benchmark.
        num_classes, num_images: as published; None is not checked.
        confirmed: whether id, split and columns were found in public documentation or code.
        licence, note: licence, and remarks for users.
    """

    name: str
    title: str
    hub_id: str | None = None
    config: str | None = None
    split: str | None = "test"
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    ensemble_templates: tuple[str, ...] = ENSEMBLE_TEMPLATES
    label_map: NameOptions = field(default_factory=NameOptions)
    constants: Constants | None = "imagenet"
    corruptions: tuple[str, ...] = ()
    num_classes: int | None = None
    num_images: int | None = None
    confirmed: bool = True
    licence: str = "see the data set's card"
    note: str = ""


@dataclass(frozen=True)
class LabelledImages:
    """Hold N images with labels.

    Attributes:
        name, title: name and title of the benchmark.
        class_names: K names; several may be equal.
        labels: `(N,)` int64 in 0..K-1.
        templates, ensemble_templates: prompts, one and many.
        constants: constants of the corruptions.
        source: where the images come from, for a result file.
        rows: N mappings, decoded on access.
        image_column: key of the image in a row.
    """

    name: str
    title: str
    class_names: list[str]
    labels: Labels
    templates: tuple[str, ...]
    ensemble_templates: tuple[str, ...]
    constants: Constants
    source: Mapping[str, Any]
    rows: Any
    image_column: str

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> PIL.Image.Image:
        """Return one image, upright, 8-bit RGB.

        Raises:
            ValueError: for a damaged image; the message names the row.
        """
        try:
            return eight_bit_rgb(decode_image(self.rows[index][self.image_column]))
        except ValueError as error:
            raise ValueError(f"image {index} of {self.title}: {error}") from error

    def label(self, index: int) -> int:
        """Return the class index of an image."""
        return int(self.labels[index])

    def digest(self) -> str:
        """Return the SHA-256 of the images' and labels' contents; for drawn scenes, of their parameters."""
        drawn = isinstance(self.rows, SceneDataset)
        images = json.dumps(self.source) if drawn else images_digest(self.rows, self.image_column)
        return hashlib.sha256(images.encode() + np.asarray(self.labels, dtype=np.int64).tobytes()).hexdigest()


def load_benchmark(
    name_or_path: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | Mapping[str, str] | str | os.PathLike[str] | None = None,
    max_images: int | None = None,
    seed: int = 0,
    templates: Sequence[str] | None = None,
    ensemble_templates: Sequence[str] | None = None,
    constants: Constants | None = None,
) -> LabelledImages:
    """Load a benchmark's images and labels, and check that they fit its classes.

    Args:
        name_or_path: one of `BENCHMARKS`, or `"scenes"`, or what [`load_images`] takes: a folder, a parquet file or a
            Hub name.
        data: a local copy of the registered benchmark: a folder or a parquet file.
        split: by default the benchmark's, or else the only one or the first of test, validation, val, ...
        image_column, label_column: by default the benchmark's, or as [`load_images`] finds them. Labels are integers,
            or text: then their values are the classes.
        class_names: for data that has only numbers or WordNet ids: names in the order of the numbers or of the sorted
            ids, ids -> names, or a file for [`read_class_names`]. By default `classnames.txt`, `README.txt` or
            `LOC_synset_mapping.txt` in the folder of the data or the one above.
        max_images: a random subset of this size, drawn with `seed`.
        templates, ensemble_templates, constants: replace the benchmark's.

    Raises:
        ValueError: for labels that do not fit the classes, other classes than published, missing columns or names.
        FileNotFoundError: for a path that does not exist. ImportError: `datasets` is not installed.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"expected at least one image, got max_images={max_images}.")
    name = os.path.expanduser(os.fspath(name_or_path))
    if name == "scenes":
        return scenes_benchmark(max_images or NUM_SCENES, seed=seed)
    benchmark = BENCHMARKS.get(name)
    if benchmark is None:
        if data is not None:
            raise ValueError(f"expected one of {', '.join(BENCHMARKS)} with `data`, got {name!r}.")
        title = os.path.basename(name.rstrip("/")) or name
        benchmark = Benchmark(name=title, title=title, hub_id=name, split=None, constants=None)
        data = name if os.path.exists(name) else None
    place = _hub_place(benchmark) if data is None else os.path.expanduser(os.fspath(data))
    if data is not None and not os.path.exists(place):  # or a mistyped folder would be requested from the Hub
        raise FileNotFoundError(f"there is no file or folder {place!r}.")
    if isinstance(class_names, str | os.PathLike):
        class_names = read_class_names(class_names)

    if list(Path(place).glob("*_data.npy")):
        found = _load_arrays(Path(place))
    else:
        found = _load_rows(
            place,
            label_column or benchmark.label_column,
            label_column_may_differ=data is not None and label_column is None,
            split=split or _choose_split(place, benchmark),
            image_column=image_column or (benchmark.image_column if data is None else None),
            revision=benchmark.revision,
        )
    label_column = found.require_labels()
    values, sources = _labels_and_sources(found, label_column)
    if class_names is None and lacks_names(sources):
        class_names = found.class_names if sources is None else _names_beside(found, label_column)
        class_names = class_names or _names_file(place, benchmark, data is not None)
        class_names = class_names or benchmark.label_map.class_names
    label_map = build_label_map(
        sources,
        class_names,
        num_classes=benchmark.num_classes,
        sources_are_labels=bool(values) and isinstance(values[0], str),
        options=benchmark.label_map,
    )
    labels, rows = label_map(values), found.dataset  # from all images: a subset may lack classes
    _warn_of_differences(benchmark, labels, len(label_map.class_names))
    if max_images is not None:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(labels))[:max_images])
        labels, rows = labels[chosen], rows.select(chosen)
    images = LabelledImages(
        name=benchmark.name,
        title=benchmark.title,
        class_names=label_map.class_names,
        labels=labels,
        templates=tuple(templates or benchmark.templates),
        ensemble_templates=tuple(ensemble_templates or benchmark.ensemble_templates),
        constants=constants or benchmark.constants or "imagenet",
        source={
            "data": place,
            "split": found.split,
            "revision": benchmark.revision,
            "max_images": max_images,
            "seed": seed,
        },
        rows=rows,
        image_column=found.image_column,
    )
    if constants is None and benchmark.constants is None and min(images.image(0).size) < SMALL_SIDE:
        images = replace(images, constants="cifar")
    return images


def scenes_benchmark(num_images: int, *, seed: int = 0) -> LabelledImages:
    """Return the package's procedural scenes, for use without a network; 96 pixels, hence CIFAR's constants.

    Seed s is stream s + 1 of [`SceneDataset`]: the embedded teacher and student were trained on stream 0.
    """
    scenes = SceneDataset(num_images, seed=seed + 1)
    return LabelledImages(
        name="scenes",
        title="Procedural scenes",
        class_names=list(CLASS_NAMES),
        labels=np.arange(num_images) % len(CLASS_NAMES),
        templates=DEFAULT_TEMPLATES,
        ensemble_templates=ENSEMBLE_TEMPLATES,
        constants="cifar",
        source={"data": "apm_hf.data.scenes", "seed": seed},
        rows=scenes,
        image_column="image",
    )


def _hub_place(benchmark: Benchmark) -> str:
    if benchmark.hub_id is None:
        raise ValueError(f"{benchmark.title} has no place on the Hub; give your copy with `data`. {benchmark.note}")
    if not benchmark.confirmed:
        logger.warning(f"{benchmark.title}: could not confirm its format on the Hub. {benchmark.note}")
    return f"{benchmark.hub_id}:{benchmark.config}" if benchmark.config else benchmark.hub_id


def _choose_split(place: str, benchmark: Benchmark) -> str:
    names = Source.parse(place, benchmark.revision).split_names
    if benchmark.split in names or len(names) == 1:
        return benchmark.split if benchmark.split in names else names[0]
    for split in ("test", *VALIDATION_SPLITS):  # never "train" if there is another
        if split in names:
            return split
    raise ValueError(f"{place} has several splits; choose one of {names} with `split`.")


def _load_rows(place: str, label_column: str | None, *, label_column_may_differ: bool, **options: Any) -> ImageData:
    """Load rows as [`load_images`] does, but accept text labels as well as integers."""
    try:
        return load_images(place, label_column=label_column, **options)
    except ValueError:
        if label_column is None:
            raise
        data = load_images(place, **options)
        if getattr(data.dataset.features.get(label_column), "dtype", None) in TEXT:
            return replace(data, label_column=label_column, class_names=None)
        if label_column_may_differ and label_column not in data.dataset.features:
            return data
        raise


def _load_arrays(folder: Path) -> ImageData:
    """Load CIFAR-10.1's release: `*_data.npy` `(N, H, W, 3)` uint8 and `*_labels.npy` `(N,)`."""
    import datasets

    arrays = [sorted(folder.glob(f"*_{kind}.npy")) for kind in ("data", "labels")]
    if [len(files) for files in arrays] != [1, 1]:
        names = first_five([path.name for files in arrays for path in files])
        raise ValueError(f"expected one *_data.npy and one *_labels.npy in {folder}, got {names}.")
    pixels, labels = (np.load(files[0], allow_pickle=False) for files in arrays)
    if pixels.shape[:1] != labels.shape:
        raise ValueError(f"expected as many images as labels in {folder}, got {pixels.shape} and {labels.shape}.")
    columns = {"image": [PIL.Image.fromarray(image) for image in pixels], "label": labels.tolist()}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict(columns, features=features)
    return ImageData(dataset, "image", "label", None, arrays[0][0].name)


def _labels_and_sources(data: ImageData, label_column: str) -> tuple[list[Any], list[str] | None]:
    """Return every row's entry in the label column, and the data set's class names, if it has them."""
    feature = data.dataset.features[label_column]
    values = data.dataset.select_columns([label_column])[label_column][:]
    if hasattr(feature, "names"):
        return values, list(feature.names)
    return values, sorted(set(values)) if feature.dtype in TEXT else None


def _names_beside(data: ImageData, label_column: str) -> dict[str, str] | None:
    """Return WordNet id -> name, if a column next to that of the ids has one name for each."""
    for column in CLASS_NAME_COLUMNS:
        if getattr(data.dataset.features.get(column), "dtype", None) in TEXT:
            rows = data.dataset.select_columns([label_column, column])
            feature, labels = rows.features[label_column], rows[label_column][:]
            ids = feature.int2str(labels) if hasattr(feature, "names") else labels
            pairs = set(zip(ids, rows[column][:], strict=True))
            if len(pairs) == len(dict(pairs)):
                return dict(pairs)
    return None


def _names_file(place: str, benchmark: Benchmark, is_copy: bool) -> list[str] | dict[str, str] | None:
    """Read class names from a file next to the data."""
    file = benchmark.label_map.names_file
    if not is_copy:
        if file is None:
            return None
        from huggingface_hub import hf_hub_download

        assert benchmark.hub_id is not None
        path = hf_hub_download(benchmark.hub_id, file, repo_type="dataset", revision=benchmark.revision)
        return read_class_names(path)
    folder = Path(place) if os.path.isdir(place) else Path(place).parent
    for beside in (parent / name for parent in (folder, folder.absolute().parent) for name in NAME_FILES):
        if beside.is_file():
            names = read_class_names(beside)
            if isinstance(names, dict) or beside.name == NAME_FILES[0]:  # any other README is prose
                logger.info(f"class names from {beside}.")
                return names
    return None


def _warn_of_differences(benchmark: Benchmark, labels: Labels, num_classes: int) -> None:
    if benchmark.num_images not in (None, len(labels)):
        logger.warning(f"{benchmark.title}: {len(labels)} images, published are {benchmark.num_images}.")
    if empty := num_classes - len(np.unique(labels)):
        logger.warning(f"{benchmark.title}: {empty} of {num_classes} classes have no image.")


def _a_type_of(kind: str) -> dict[str, Any]:
    """Return prompts that name the kind of a fine-grained class, as CLIP's do (arXiv:2103.00020, Sec. 3.1.4)."""
    single, many = (
        tuple(f"{template.removesuffix('.')}, a type of {kind}." for template in templates)
        for templates in (DEFAULT_TEMPLATES, ENSEMBLE_TEMPLATES)
    )
    return {"templates": single, "ensemble_templates": many}


def _entry(name: str, title: str, hub_id: str | None, num_classes: int, num_images: int, **options: Any) -> Benchmark:
    options = {"image_column": "image", "label_column": "label", **options}
    return Benchmark(name=name, title=title, hub_id=hub_id, num_classes=num_classes, num_images=num_images, **options)


def _of_clip_benchmark(image_column: str | None, **options: Any) -> dict[str, Any]:
    """Return options for sets of https://huggingface.co/clip-benchmark: labels in `cls`, names in a file."""
    names = NameOptions(names_file="classnames.txt")
    return {"image_column": image_column, "label_column": "cls", "label_map": names, **options}


_IMAGENET = _entry(
    *("imagenet", "ImageNet", "ILSVRC/imagenet-1k", 1000, 50_000),
    split="validation",
    # Names must differ on the Hub, so one of the two cranes has a number there.
    label_map=NameOptions(first_synonym=True, renames={"crane2": "crane"}),
    licence="non-commercial research; accept the terms on the Hub",
)
_CIFAR10 = _entry(
    *("cifar10", "CIFAR-10", "uoft-cs/cifar10", 10, 10_000),
    config="plain_text",
    image_column="img",
    constants="cifar",
)
_CIFAR100 = _entry(
    *("cifar100", "CIFAR-100", "uoft-cs/cifar100", 100, 10_000),
    config="cifar100",
    image_column="img",
    label_column="fine_label",
    label_map=NameOptions(renames={"cra": "crab"}),  # as spelled on the Hub
    constants="cifar",
)
_CIFAR10_1 = _entry(
    *("cifar10_1", "CIFAR-10.1", None, 10, 2_000),
    label_map=NameOptions(
        class_names=tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    ),
    constants="cifar",
    confirmed=False,
    licence="MIT",
    note="Put cifar10.1_v6_data.npy and cifar10.1_v6_labels.npy, from https://github.com/modestyachts/CIFAR-10.1, "
    "into a folder.",
)
_NATURAL_SHIFTS = (
    _entry("imagenet_a", "ImageNet-A", "clip-benchmark/wds_imagenet-a", 200, 7_500, **_of_clip_benchmark("jpg")),
    _entry(
        *("imagenet_v2", "ImageNet-V2", "clip-benchmark/wds_imagenetv2", 1000, 10_000),
        **_of_clip_benchmark("webp", licence="MIT", note="matched frequency"),
    ),
    _entry(
        *("imagenet_r", "ImageNet-R", "clip-benchmark/wds_imagenet-r", 200, 30_000),
        **_of_clip_benchmark("jpg", licence="MIT"),
    ),
    _entry(
        *("imagenet_sketch", "ImageNet-Sketch", "clip-benchmark/wds_imagenet_sketch", 1000, 50_889),
        **_of_clip_benchmark("jpg"),
    ),
)
_FINE_GRAINED = (
    _entry(
        *("flowers102", "Flowers102", "dpdl-benchmark/oxford_flowers102", 102, 6_149),
        **_a_type_of("flower"),
        note="CoOp's split has 2,463 test images.",
    ),
    _entry(
        *("dtd", "DTD", "tanganke/dtd", 47, 1_880),
        templates=("{} texture.",),
        ensemble_templates=(
            *("{} texture.", "a photo of a {} texture.", "a close photo of something {}."),
            *("a surface with a {} pattern.", "a {} material."),
        ),
        note="CoOp's split has 1,692 test images.",
    ),
    _entry(
        *("pets", "Oxford Pets", "timm/oxford-iiit-pet", 37, 3_669),
        **_a_type_of("pet"),
        licence="CC BY-SA 4.0",
    ),
    _entry(
        *("ucf101", "UCF101", "flwrlabs/ucf101", 101, 3_783),
        templates=("a photo of a person doing {}.",),
        ensemble_templates=(
            *("a photo of a person doing {}.", "a person during {}.", "a video frame that shows {}."),
            *("someone is doing {}.", "a blurry photo of {}."),
        ),
        label_map=NameOptions(split_words=True),
        confirmed=False,
        note="The Hub's set has every frame of every clip; papers take the middle frame of each: use `data`.",
    ),
    _entry(
        *("caltech101", "Caltech101", "dpdl-benchmark/caltech101", 102, 6_084),
        note="Includes the background class; CoOp's split has 100 classes and 2,465 test images.",
    ),
    _entry("food101", "Food101", "ethz/food101", 101, 25_250, split="validation", **_a_type_of("food")),
    _entry("sun397", "SUN397", "tanganke/sun397", 397, 19_850),
    _entry(
        *("aircraft", "FGVC Aircraft", "clip-benchmark/wds_fgvc_aircraft", 100, 3_333),
        **_of_clip_benchmark(None, **_a_type_of("aircraft"), licence="non-commercial research"),
    ),
    _entry(
        *("eurosat", "EuroSAT", "tanganke/eurosat", 10, 2_700),
        templates=("a centered satellite photo of {}.",),
        ensemble_templates=(
            *("a centered satellite photo of {}.", "a satellite photo of {}.", "an aerial view of {}."),
            *("{} seen from space.", "land that is {}."),
        ),
        label_map=NameOptions(split_words=True),
        note="CoOp's split has 8,100 test images.",
    ),
    _entry("stanford_cars", "Stanford Cars", "tanganke/stanford_cars", 196, 8_041),
)
_MADE_ON_THE_FLY = tuple(
    replace(clean, name=f"{clean.name}_c", title=f"{clean.title}-C", corruptions=CORRUPTION_NAMES)
    for clean in (_IMAGENET, _CIFAR10, _CIFAR100)
)
_ALL = (_IMAGENET, *_NATURAL_SHIFTS, _CIFAR10, _CIFAR10_1, _CIFAR100, *_MADE_ON_THE_FLY, *_FINE_GRAINED)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
