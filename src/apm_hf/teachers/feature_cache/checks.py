"""Check that there is room for a feature cache, and write the index that completes it."""

import shutil
from pathlib import Path
from typing import Any

from ...runs.checksums import write_checksummed
from ...runs.files import sync
from ...runs.run import Run
from ...runs.unreadable_images import check_limit
from .layout import INDEX, Estimate, shard_name


def check_room(folder: Path, size: Estimate) -> None:
    """Refuse a disk that is too small, before anything is computed.

    Raises:
        ValueError: says how much is needed and how much is free.
    """
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    needed, free = size.num_bytes - there, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"output_dir: expected {needed / 1e9:.3g} GB free for the rest of {size.num_images} images, got "
            f"{free / 1e9:.3g} GB; keep fewer locations (--num_locations), a smaller dtype, or use another disk"
        )


def write_index(run: Run, plan: dict[str, Any], num_shards: int, max_unreadable_images: int) -> None:
    """Write the index when all shards are there: from now on the folder is a cache.

    Raises:
        ValueError: for more unreadable images than the limit.
    """
    shards, bad = [], []
    for number in range(num_shards):
        noted = run.noted(shard_name(number))
        bad += noted["content"]["bad"]
        file = run.tensors(shard_name(number)).name
        shards.append({"file": file, "rows": noted["content"]["rows"], **noted["tensors"]})
    check_limit([f"row {one['row']}: {one['reason']}" for one in bad], max_unreadable_images)
    write_checksummed(run.folder / INDEX, {**plan, "shards": shards, "bad": bad})
    sync(run.folder)
