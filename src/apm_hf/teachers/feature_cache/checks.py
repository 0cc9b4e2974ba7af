"""What must hold before a feature cache is written, and what makes it whole."""

import shutil
from pathlib import Path
from typing import Any

from ...runs.checksums import read_sealed, write_sealed
from ...runs.files import sync
from .layout import INDEX, PLAN, Estimate, shard_names
from .reader import differences


def check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """What is there already must be a part of the same cache."""
    try:
        there = read_sealed(folder / PLAN)
    except FileNotFoundError:
        if any(folder.glob("*.safetensors")):
            raise ValueError(f"output_dir: expected a new folder or a cache, got {folder}, with other files") from None
        return
    if found := differences(there, plan):
        raise ValueError(
            f"output_dir: expected a new folder, or the same cache half written, got {folder}, a cache with other "
            f"{', '.join(found)}"
        )


def check_room(folder: Path, size: Estimate) -> None:
    """Before anything is computed."""
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    needed, free = size.num_bytes - there, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"output_dir: expected {needed / 1e9:.3g} GB free for the rest of {size.num_images} images, got "
            f"{free / 1e9:.3g} GB; keep fewer locations (--num_locations), a smaller dtype, or use another disk"
        )


def write_index(folder: Path, plan: dict[str, Any], num_shards: int, max_bad_images: int) -> None:
    """When all shards are there: from now on it is a cache."""
    shards, bad = [], []
    for number in range(num_shards):
        file, note = shard_names(number)
        noted = read_sealed(folder / note)
        bad += noted.pop("bad")
        shards.append({"file": file, **noted})
    if len(bad) > max_bad_images:
        raise ValueError(
            f"max_bad_images: expected at most {max_bad_images} unreadable images, got {len(bad)}, the last of them "
            f"row {bad[-1]['row']}: {bad[-1]['reason']}"
        )
    write_sealed(folder / INDEX, {**plan, "shards": shards, "bad": bad})
    sync(folder)
