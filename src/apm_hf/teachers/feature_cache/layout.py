"""What lies in a feature cache, what it is of, and how large it becomes.

    FOLDER/
        00000.safetensors   features, image_embeds, rows and, where there are any, locations and levels of some images
        00000.json          size and SHA-256 of that file, and the rows that are missing in it
        plan.json           what the cache is of; written first
        index.json          the same, and what the other JSON files say; written last: without it a cache is not whole

Shard i holds rows `i * images_per_shard` onwards, whoever writes it. JSON files carry a checksum of their own.

Legend: n images of a shard, N levels, C width of a level, F feature width, (rows, cols) the teacher's grid, L =
rows * cols, l of them kept.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from ..licenses import public_name

FORMAT = 1
INDEX, PLAN = "index.json", "plan.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHARD_BYTES = 2**28  # of features, where nothing else is asked for: some seconds of any disk, a short time to lose
SAMPLED_IMAGES = 32  # of a data set, whose contents tell it from others


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """How a teacher's answers are kept.

    Args:
        dtype: `bfloat16`, `float16` or `float32`.
        num_locations: l, places kept of each image, drawn from seed and row; None keeps the grid.
        level_layers: of the teacher, whose patches are kept as levels, normalised.
        images_per_shard: by default as many as make 256 MiB.
        seed: of the places.

    Raises:
        ValueError: for a value outside its range; says what was expected.
    """

    dtype: str = "bfloat16"
    num_locations: int | None = None
    level_layers: list[int] | None = None
    images_per_shard: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {self.dtype!r}")
        for name in ("num_locations", "images_per_shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive number or None, got {value}")


@dataclass(frozen=True)
class Estimate:
    """What a cache will take.

    Args:
        num_images, num_shards: of all processes.
        bytes_per_image, num_bytes: on the disk; `num_bytes` of the whole cache.
        images_per_shard: but for the last one.
    """

    num_images: int
    num_shards: int
    bytes_per_image: int
    num_bytes: int
    images_per_shard: int


def grid_of(teacher: Any) -> tuple[int, int]:
    """(rows, cols) of what the teacher answers to its image processor's pictures."""
    side = teacher.image_size // teacher.patch_size
    return side, side


def estimate(teacher: Any, num_images: int, settings: CacheSettings) -> Estimate:
    """Nothing is computed: sizes follow from the teacher's grid and widths.

    Raises:
        ValueError: for no images, or more locations than the grid has.
    """
    if num_images < 1:
        raise ValueError("dataset: expected at least one image, got none")
    rows, cols = grid_of(teacher)
    places = settings.num_locations or rows * cols
    if places > rows * cols:
        raise ValueError(f"num_locations: expected at most the teacher's {rows} x {cols} patches, got {places}")
    values = (places + 1) * teacher.feature_size
    values += len(settings.level_layers or ()) * places * teacher.hidden_size
    size = values * DTYPES[settings.dtype].itemsize + 8  # int64 `rows`
    size += places * 4 if settings.num_locations else 0  # int32 `locations`
    per_shard = settings.images_per_shard or max(1, SHARD_BYTES // size)
    per_shard = min(per_shard, num_images)
    num_shards = -(-num_images // per_shard)
    return Estimate(num_images, num_shards, size, size * num_images + num_shards * 2048, per_shard)


def contents(
    teacher: Any, images: Any, image_column: str, settings: CacheSettings, *, dataset_name: str
) -> dict[str, Any]:
    """What a cache is of, as `index.json` says it: two caches of which this is equal have the same answers."""
    plan = estimate(teacher, len(images), settings)
    return {
        "format": FORMAT,
        "teacher": of_teacher(teacher),
        "dataset": {"name": public_name(dataset_name), "fingerprint": fingerprint(images, image_column)},
        "num_rows": len(images),
        "grid": list(grid_of(teacher)),
        "images_per_shard": plan.images_per_shard,
        "settings": {name: value for name, value in asdict(settings).items() if name != "images_per_shard"},
    }


def of_teacher(teacher: Any) -> dict[str, Any]:
    """Its name and widths, a hash of some of its weights, and its image processor's settings, as JSON."""
    weights = hashlib.sha256()
    for name, weight in sorted(teacher.model.state_dict().items()):
        weights.update(name.encode())
        weights.update(str(weight.flatten()[:8].double().cpu().tolist()).encode())
    return {
        "name": public_name(teacher.name),
        "feature_size": teacher.feature_size,
        "hidden_size": teacher.hidden_size,
        "image_size": teacher.image_size,
        "patch_size": teacher.patch_size,
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "weights": weights.hexdigest(),
        "image_processor": processor_settings(teacher.image_processor),
    }


def processor_settings(image_processor: Any) -> dict[str, Any]:
    """What decides on pixels: backends and versions, which change their last bits alone, are left out."""
    fields = image_processor.to_dict() if hasattr(image_processor, "to_dict") else {"class": type(image_processor)}
    names = ("image_processor_type", "feature_extractor_type", "processor_class", "transformers_version", "auto_map")
    kept = {name: value for name, value in fields.items() if not name.startswith("_") and name not in names}
    return json.loads(json.dumps({name: value for name, value in kept.items() if value is not None}, default=str))


def fingerprint(images: Any, image_column: str) -> str:
    """SHA-256 of the number of images and of the contents of some, the same wherever the data set lies."""
    length = len(images)
    digest = hashlib.sha256(str(length).encode())
    for row in sorted({index * (length - 1) // (SAMPLED_IMAGES - 1) for index in range(SAMPLED_IMAGES)}):
        digest.update(_content(images[row].get(image_column)))
    return digest.hexdigest()


def _content(value: Any) -> bytes:
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
        value = path if value is None else value
    if isinstance(value, PIL.Image.Image):
        return value.tobytes()
    if isinstance(value, str | os.PathLike):
        try:
            return Path(value).read_bytes()
        except OSError:  # whoever decodes it says what is wrong
            return b"unreadable"
    return bytes(value) if isinstance(value, bytes | bytearray | memoryview) else repr(value).encode()


def drawn_locations(rows: list[int], num_locations: int, num_patches: int, seed: int) -> Tensor:
    """`(n, l)` int32, ascending: of each row another draw, which depends on seed and row alone."""
    draws = []
    for row in rows:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63)
        draws.append(torch.randperm(num_patches, generator=generator)[:num_locations].sort().values)
    return torch.stack(draws).int()


def shard_names(number: int) -> tuple[str, str]:
    """Of a shard and of what is written down about it."""
    return f"{number:05d}.safetensors", f"{number:05d}.json"
