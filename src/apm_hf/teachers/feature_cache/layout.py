"""Define the files of a feature cache, their contents and their size.

    FOLDER/
        00000.safetensors   features, image_embeds, rows and, where there are any, locations and levels of some images
        00000.json          size and SHA-256 of that file, and the rows that are missing in it
        run.json            what the cache is of; written first, see [`apm_hf.runs.run.Run`]
        index.json          the same, and what the other JSON files say; written last: without it a cache is incomplete

Shard i holds rows `i * images_per_shard` onwards, whichever process writes it. JSON files carry their own checksum.

Legend: n images of a shard, N levels, C width of a level, F feature width, (rows, cols) the teacher's grid, L =
rows * cols, l of them kept.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...data.augmentation import RandomCrops
from ...runs.identity import images_digest
from ..licenses import public_name

FORMAT = 1
INDEX = "index.json"
VERIFIED = ".verified.json"  # which shards were compared with the index, by size and time
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHARD_BYTES = 2**28  # of features, where nothing else is asked for: some seconds of any disk, a short time to lose


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Configure how a teacher's outputs are cached.

    Args:
        dtype: `bfloat16`, `float16` or `float32`.
        num_locations: l, locations cached of each image, drawn from seed and row; None caches the grid.
        level_layers: of the teacher, whose normalised patch tokens are cached as levels.
        images_per_shard: by default as many as make 256 MiB.
        seed: random seed of the locations.

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
    """Estimate the size of a cache.

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
    """Return (rows, cols) of the teacher's features for images from its image processor."""
    side = teacher.image_size // teacher.patch_size
    return side, side


def estimate(teacher: Any, num_images: int, settings: CacheSettings) -> Estimate:
    """Compute a cache's size from the teacher's grid and widths, without running the teacher.

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
    """Describe what a cache is made from, as `index.json` holds it: equal descriptions mean equal features."""
    plan = estimate(teacher, len(images), settings)
    photos, crops = (images.dataset, images.settings) if isinstance(images, RandomCrops) else (images, None)
    if crops is not None and not crops["views"]:
        raise ValueError("images: expected a fixed number of views of each, got crops that every epoch makes anew")
    return {
        "format": FORMAT,
        "teacher": teacher.identity(),
        "dataset": {"name": public_name(dataset_name), "fingerprint": images_digest(photos, image_column)},
        "crops": crops,
        "num_rows": len(images),
        "grid": list(grid_of(teacher)),
        "images_per_shard": plan.images_per_shard,
        "settings": {name: value for name, value in asdict(settings).items() if name != "images_per_shard"},
    }


def drawn_locations(rows: list[int], num_locations: int, num_patches: int, seed: int) -> Tensor:
    """Draw locations `(n, l)` int32, ascending, another draw for each row, which depends on seed and row alone."""
    draws = []
    for row in rows:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63)
        draws.append(torch.randperm(num_patches, generator=generator)[:num_locations].sort().values)
    return torch.stack(draws).int()


def shard_name(number: int) -> str:
    """Name a shard as a part of its run."""
    return f"{number:05d}"
