"""Read a feature cache as a data set, each row beside its image, without loading files into memory.

safetensors maps files into memory, and `safe_open(...).get_tensor` gives a whole shard as a view of the map: nothing
is read until a row is, and its bytes are copied once, when a batch is made. `benchmarks/data.py` compares other ways.

Legend: N levels, C width of a level, F feature width, (rows, cols) the teacher's grid, l locations kept of it.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ...data.augmentation import RandomCrops
from ...runs.checksums import fault_of, read_checksummed, write_checksummed
from ...runs.identity import images_digest
from ...runs.run import differences
from .layout import INDEX, VERIFIED


class FeatureCache(Dataset):
    """Read the cached outputs for every readable image, in the data set's order.

    A row has `features` `(rows, cols, F)`, `image_embeds` `(F,)` float32 and, where they were kept, `levels`
    `(N, rows, cols, C)`. Of a cache of l locations it has `features` `(l, F)`, `levels` `(N, l, C)`, `locations`
    `(l,)` int64, indices into the row-major grid, and that `grid` `(2,)`. Features are views of the files: copy before
    writing into them. It can be pickled; every process maps the files for itself.

    Attributes:
        index: what `index.json` says.
        rows: numbers, in the data set, of the rows there are; ascending.

    Args:
        folder: made by [`write_feature_cache`] or `apm cache-features`.

    Raises:
        ValueError: for what is no complete cache, or a file of another size; names the file, what was expected and
            found. A file's SHA-256 is compared when its first row is read, unless [`FeatureCache.verify`] compared it
            before, in any process, and neither its size nor its time of change differs since.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.index = read_checksummed(self.folder / INDEX)
        except OSError as error:
            raise ValueError(
                f"feature_cache: expected a folder with {INDEX}, got {os.fspath(folder)!r} ({error.strerror}): not a "
                "cache, or one half written, which `apm cache-features` goes on with"
            ) from error
        except ValueError as error:
            raise ValueError(f"feature_cache: {error}") from error
        for shard in self.index["shards"]:
            if fault := fault_of(self.folder / shard["file"], shard["size"], None):
                raise ValueError(f"feature_cache: {self.folder / shard['file']}: {fault}{_AGAIN}")
        self._bad = np.array([bad["row"] for bad in self.index["bad"]], dtype=np.int64)
        everything = range(self.index["num_rows"])
        self.rows: np.ndarray | range = np.delete(everything, self._bad) if len(self._bad) else everything
        self._open: dict[int, dict[str, Tensor]] = {}
        self._verified = self._remembered()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        row = int(self.rows[position])
        number = row // self.index["images_per_shard"]
        start = number * self.index["images_per_shard"]
        tensors, place = self._shard(number), row - start
        if len(self._bad):
            first, last = np.searchsorted(self._bad, [start, row]).tolist()
            place -= last - first
        answer: dict[str, Tensor] = {name: tensors[name][place] for name in ("features", "levels") if name in tensors}
        answer["image_embeds"] = tensors["image_embeds"][place].float()
        if "locations" in tensors:
            answer["locations"], answer["grid"] = tensors["locations"][place].long(), torch.tensor(self.index["grid"])
        return answer

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Tensor]]:
        return [self[position] for position in positions]

    def verify(self, *, again: bool = False) -> "FeatureCache":
        """Compare the SHA-256 of every file with the index, and remember in the folder which files were compared.

        Args:
            again: compare those too whose size and time of change are as they were remembered.

        Raises:
            ValueError: for the first that is not as it was written.
        """
        before, self._verified = {} if again else self._remembered(), {}
        for number, shard in enumerate(self.index["shards"]):
            mark = self._mark(shard)
            if before.get(shard["file"]) != mark:
                self._open.pop(number, None)
                self._shard(number)
            self._verified[shard["file"]] = mark
        if self._verified != before:
            try:
                write_checksummed(self.folder / VERIFIED, {"files": self._verified})
            except OSError:  # a folder that can only be read is verified once in every process
                pass
        return self

    def digest(self) -> str:
        """Return the SHA-256 of the images that the cache was made from."""
        return self.index["dataset"]["fingerprint"]

    @property
    def facts(self) -> dict[str, Any]:
        """Return what decides on the features, beside teacher and images."""
        return {**self.index["settings"], "crops": self.index["crops"]}

    @property
    def views(self) -> int:
        """Return how many rows each image has: its crops, or itself."""
        return self.index["crops"]["views"] if self.index["crops"] else 1

    def check(
        self,
        teacher: Any,
        images: Any,
        *,
        image_column: str = "image",
        level_layers: Sequence[int] | None = None,
    ) -> None:
        """Check that the cache holds this teacher's outputs for these images, or for crops of them.

        Raises:
            ValueError: names all that differs; `expected` is what is asked for, `got` the cache's.
        """
        found = differences({"teacher": self.index["teacher"]}, {"teacher": teacher.identity()})
        if self.index["teacher"]["dtype"] != str(teacher.dtype).removeprefix("torch."):
            # Another precision changes last bits, which is allowed; the weights are compared as bfloat16.
            found = [line for line in found if line not in ("teacher.weights",) and "teacher.dtype" not in line]
        if len(images) * self.views != self.index["num_rows"]:
            found.append(f"number of images (expected {len(images)}, got {self.index['num_rows'] // self.views})")
        elif images_digest(images, image_column) != self.index["dataset"]["fingerprint"]:
            found.append(f"images (the cache is of {self.index['dataset']['name']!r})")
        kept, asked = self.index["settings"]["level_layers"] or [], list(level_layers or [])
        if asked != kept:
            found.append(f"level_layers (expected {asked}, got {kept})")
        if found:
            raise ValueError(f"feature_cache: {self.folder} does not fit, it has other {', '.join(found)}")

    def _remembered(self) -> dict[str, list[Any]]:
        """Return the marks of files that were compared before, by name; none where that cannot be read."""
        try:
            return read_checksummed(self.folder / VERIFIED)["files"]
        except (OSError, ValueError):
            return {}

    def _mark(self, shard: dict[str, Any]) -> list[Any]:
        """Return what tells whether a file has changed: its size in bytes and its time of change in nanoseconds."""
        try:
            facts = (self.folder / shard["file"]).stat()
        except OSError:  # reading it reports what is wrong
            return []
        return [facts.st_size, facts.st_mtime_ns, shard["sha256"]]

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._open:
            shard = self.index["shards"][number]
            path = self.folder / shard["file"]
            known = self._verified.get(shard["file"]) == self._mark(shard)
            if fault := fault_of(path, shard["size"], None if known else shard["sha256"]):
                raise ValueError(f"feature_cache: {path}: {fault}{_AGAIN}")
            try:
                with safe_open(path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}
            except (SafetensorError, OSError) as error:
                raise ValueError(f"feature_cache: {path}: {error}{_AGAIN}") from error
            if len(tensors.pop("rows", ())) != shard["rows"]:
                raise ValueError(f"feature_cache: {path}: expected {shard['rows']} rows, found others{_AGAIN}")
            self._open[number] = tensors
        return self._open[number]


_AGAIN = "; the command that made the cache verifies it and writes again what is damaged"


class CachedImages(Dataset):
    """Join rows of a data set with their `index` and cached outputs; images without outputs are left out.

    Where the cache is of crops, these are what the rows hold.

    Args:
        images: rows with images, by index.
        cache: of these images.
        image_column: their column of images.
    """

    def __init__(self, images: Any, cache: FeatureCache, *, image_column: str = "image") -> None:
        crops = cache.index["crops"]
        self.images = RandomCrops(images, image_column, **crops) if crops else images
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def digest(self) -> str:
        """Return the SHA-256 of the images that the cache was made from."""
        return self.cache.digest()

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        rows = [int(self.cache.rows[position]) for position in positions]
        at_once = getattr(self.images, "__getitems__", None)
        images = at_once(rows) if at_once else [self.images[row] for row in rows]
        answers = self.cache.__getitems__(positions)
        return [{"index": row, **image, **answer} for row, image, answer in zip(rows, images, answers, strict=True)]


__all__ = ["CachedImages", "FeatureCache"]
