"""Write the features of a photo at any resolution to a file, row by row, in flat memory."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.utils.logging import tqdm

from ..position_encoding import cell_centres, sample_grid
from ..runs.files import safetensors_header, write_atomically
from ..ttt.maps import query
from ..ttt.photos import map_size, teacher_features
from .apm import APM

NAMES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}
BAND_LOCATIONS = 2**16  # locations queried at a time


def dense_rows(apm: APM, photo: Image.Image, size: tuple[int, int]) -> Iterator[Tensor]:
    """Yield bands of a map of features, `(rows of the band, cols, F)` float32, from the top down.

    Args:
        apm: the student is queried; of a teacher alone the grid is interpolated bilinearly.
        photo: seen whole.
        size: (rows, cols) of the map.
    """
    rows, cols = size
    if apm.model is None:
        assert apm.teacher is not None
        grid = teacher_features(apm.teacher, [photo], fine=False).float().cpu()
    else:
        pixel_values = apm.pixel_values(photo)
        column = apm.trigger_column(photo, pixel_values)
    y, x = cell_centres(rows), cell_centres(cols)
    for part in y.split(max(1, BAND_LOCATIONS // cols)):
        places = torch.stack(torch.meshgrid(part, x, indexing="ij"), dim=-1).flatten(0, 1)  # (L, 2)
        if apm.model is None:
            features: Any = sample_grid(grid, places[None])
        else:
            features = query(apm.bare_model, pixel_values, places, trigger_column=column).last_hidden_state
        yield features[0].unflatten(0, (len(part), cols)).float().cpu()


def write_dense(
    apm: APM, photo: Image.Image, size: int, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float16
) -> dict[str, Any]:
    """Write a map of features as `features` `(rows, cols, F)` of a safetensors file, which can be memory-mapped.

    Args:
        size: locations along the longer side; the map has the photo's shape.
        path: of the file, which is there as a whole or not at all.
        dtype: float16, bfloat16 or float32.

    Returns:
        `rows`, `cols`, `feature_size` and `bytes`.

    Raises:
        ValueError: for another dtype, or a size that is not positive.
        OSError: where the file cannot be written, as on a full disk.
    """
    if dtype not in NAMES:
        raise ValueError(f"dtype: expected one of {[str(name) for name in NAMES]}, got {dtype}")
    if size < 1:
        raise ValueError(f"size: expected a positive number of locations, got {size}")
    rows, cols = map_size(photo, size)
    width = apm.feature_size
    num_bytes = rows * cols * width * torch.empty((), dtype=dtype).element_size()

    def parts() -> Iterator[bytes]:
        yield safetensors_header({"features": (NAMES[dtype], (rows, cols, width), num_bytes)})
        with tqdm(total=rows, desc="features", unit="row") as progress:
            for band in dense_rows(apm, photo, (rows, cols)):
                yield band.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
                progress.update(len(band))

    write_atomically(Path(path), parts())
    return {"rows": rows, "cols": cols, "feature_size": width, "bytes": num_bytes}


__all__ = ["dense_rows", "write_dense"]
