"""Small data sets with masks, saved as they lie in folders of parts."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from fixtures_tiny import photo

SIZE = (44, 36)  # width, height


def mask(*labels: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Upright stripes of these labels."""
    places = np.arange(size[0]) * len(labels) // size[0]
    return Image.fromarray(np.tile(np.array(labels, dtype=np.uint8)[places], (size[1], 1)))


def save_masked(folder: Path, columns: dict[str, list[Image.Image]], *, names: list[str] | None = None) -> Path:
    """Photos and columns of masks as a parquet file, which is returned, and the names of the part labels beside it."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    number = len(next(iter(columns.values())))
    features = datasets.Features({"image": datasets.Image()} | {column: datasets.Image() for column in columns})
    rows = {"image": [photo(seed, size=SIZE) for seed in range(number)]} | columns
    path = folder / "test-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    if names is not None:
        (folder / "part_names.json").write_text(json.dumps(names))
    return path
