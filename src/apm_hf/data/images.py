"""Decode the images that rows hold, and collate rows into batches.

Legend: B rows in a batch, (S_h, S_w) a processor's output height and width.
"""

import hashlib
import io
import operator
import os
import stat
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from ..image_processing_pil_apm import read_image, upright
from ..runs.unreadable_images import PROBLEM, packed

OUTPUTS = ("features", "image_embeds", "levels", "locations", "grid")  # of a teacher, in a row that has them

MAX_FILE_BYTES = 2**30  # of an image: more than any camera's
_PNG = b"\x89PNG\r\n\x1a\n"
# What a damaged download often is instead of an image, by its first bytes.
_SIGNATURES = {
    b"<": "a page of HTML or XML",
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
    b"{": "JSON",
    b"PAR1": "parquet",
}


def decode_image(value: Any) -> PIL.Image.Image:
    """Decode a PIL image, `{"bytes", "path"}`, encoded bytes or a path into an upright PIL image of its own mode.

    Raises:
        ValueError: missing, empty, truncated or damaged data, what is no file, a format that is a program (EPS), or
            an image beyond PIL's decompression limit.
    """
    path = None
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
        value = path if value is None else value
    if isinstance(value, PIL.Image.Image):
        what = f"a PIL image of mode {value.mode}"
    elif isinstance(value, bytes | bytearray | memoryview):
        what = f"{len(value)} bytes" + (f" of {_shortened(path)}" if path else "")
    elif isinstance(value, str | os.PathLike):
        what = _shortened(value)
    else:
        raise ValueError(
            f"expected a PIL image, encoded bytes, a path or a dict of those, got {type(value).__name__}."
        )
    try:
        image = value if isinstance(value, PIL.Image.Image) else _open(value)
        if image.format == "EPS":  # a program: Pillow would hand it to Ghostscript
            raise ValueError("expected a format of pixels, got EPS")
        image = upright(image)
        image.load()
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"cannot decode {what}: {' '.join(reason.split())[:300]}") from error
    return image


def check_resized(image_processor: Any, image: PIL.Image.Image) -> None:
    """Refuse a strip of pixels that a processor would blow up beyond Pillow's limit for an image.

    Processors that resize the short side and crop the centre make 13 million columns of an image of 30,000 x 1.

    Raises:
        ValueError: says how large it would become.
    """
    size: dict[str, Any] = dict(getattr(image_processor, "size", None) or {})
    edge, limit = size.get("shortest_edge"), PIL.Image.MAX_IMAGE_PIXELS
    if not edge or not limit or size.get("longest_edge") or not getattr(image_processor, "do_resize", True):
        return
    width, height = (max(1, round(side * edge / min(image.size))) for side in image.size)
    if width * height > limit:
        raise ValueError(
            f"expected an image that is not so narrow, got {image.width} x {image.height} pixels, which would be "
            f"resized to {width} x {height}, over the limit of {limit} pixels"
        )


def eight_bit_rgb(image: Any) -> PIL.Image.Image:
    """Any image that [`read_image`] reads, as an upright 8-bit RGB picture, transparency on white.

    Raises:
        ValueError: what was expected and what came.
    """
    pixels = read_image(image).round().to(torch.uint8)
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())  # (3, H, W) -> (H, W, 3)


def read_rgb(path: str | os.PathLike[str]) -> PIL.Image.Image:
    """Read an image file as an upright 8-bit RGB picture, transparency on white.

    Raises:
        ValueError: for a file that cannot be read, with its path.
    """
    try:
        return eight_bit_rgb(decode_image(path))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


@dataclass
class ImageCollator:
    """Make a batch of dataset rows, for `torch.utils.data.DataLoader(collate_fn=...)`.

    Calling it with B rows returns `pixel_values` `(B, 3, S_h, S_w)`, `teacher_pixel_values` likewise if there is a
    teacher's processor, `teacher_pixel_values.NAME` for every additional teacher's, `labels` `(B,)` int64 if there is
    a label column, and `index` `(B,)` int64 if the rows have such a column. Teachers' processors read the same
    picture as 8-bit RGB, since few handle other modes well. Rows of [`apm_hf.teachers.feature_cache.CachedImages`]
    bring the teacher's outputs; these are collated instead of `teacher_pixel_values`.

    Attributes:
        image_processor: the student's; None leaves `pixel_values` out.
        image_column: as in [`ImageData`].
        label_column: as in [`ImageData`]; `None` leaves labels out.
        teacher_image_processor: the teacher's, if it is to run in this batch.
        teacher_image_processors: additional teachers', by the names of their heads.
        max_unreadable_images: of each process that loads images; they do not stop the run. With more than 0, such a
            row becomes a blank picture, so that batches keep their size, and batches say in `problem`, see
            [`apm_hf.runs.unreadable_images`], which rows are blank and why. The same image counts once.

    Raises:
        ValueError: an unreadable image, or one beyond `max_unreadable_images`, or a label that is no integer; the
            message names the row.
    """

    image_processor: Any
    image_column: str = "image"
    label_column: str | None = None
    teacher_image_processor: Any = None
    teacher_image_processors: Mapping[str, Any] = field(default_factory=dict)
    max_unreadable_images: int = 0
    _bad: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_unreadable_images < 0:
            raise ValueError(f"max_unreadable_images: expected 0 or more, got {self.max_unreadable_images}")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        columns: dict[str, list[Any]] = {}
        for position, row in enumerate(rows):
            try:
                example = self._process(row)
            except ValueError as error:
                place = f"row {row['index']}" if "index" in row else f"row {position} of the batch"
                raise ValueError(f"{place}: {error}") from error
            for key, value in example.items():
                columns.setdefault(key, []).append(value)
        return {
            key: torch.cat(values) if isinstance(values[0], Tensor) else torch.tensor(values, dtype=torch.int64)
            for key, values in columns.items()
        }

    def _process(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.image_column not in row:
            raise ValueError(f"has no column {self.image_column!r} but {list(row)}; name it with --image_column.")
        problem, cached = "", isinstance(row.get("features"), Tensor)
        try:
            example = self._pixels(decode_image(row[self.image_column]), cached)
        except ValueError as error:
            problem = f"{_name(row, self.image_column)}: {error}"
            self._bad.add(problem)
            if len(self._bad) > self.max_unreadable_images:
                raise
            example = self._pixels(PIL.Image.new("RGB", (64, 64)), cached)
        example |= {name: row[name][None] for name in OUTPUTS if cached and name in row}
        if self.max_unreadable_images:
            example[PROBLEM] = packed(problem)
        if self.label_column is not None:
            label: Any = row.get(self.label_column)
            try:
                example["labels"] = operator.index(label)
            except TypeError as error:
                raise ValueError(f"expected an integer in column {self.label_column!r}, got {label!r}.") from error
            if not -(2**63) <= example["labels"] < 2**63:
                raise ValueError(f"expected a 64-bit integer in column {self.label_column!r}, got {label!r}.")
        if "index" in row:
            example["index"] = row["index"]
        return example

    def _pixels(self, image: PIL.Image.Image, cached: bool) -> dict[str, Any]:
        """`(1, 3, S_h, S_w)` of each processor, the teacher's only where its outputs are not `cached`."""
        example = {}
        if self.image_processor is not None:
            check_resized(self.image_processor, image)
            example["pixel_values"] = self.image_processor(image, return_tensors="pt")["pixel_values"]
        processors = {f"teacher_pixel_values.{name}": one for name, one in self.teacher_image_processors.items()}
        if self.teacher_image_processor is not None and not cached:
            processors["teacher_pixel_values"] = self.teacher_image_processor
        rgb_image = eight_bit_rgb(image) if processors else None
        for key, processor in processors.items():
            check_resized(processor, image)
            example[key] = processor(rgb_image, return_tensors="pt")["pixel_values"]
        return example


def _name(row: Mapping[str, Any], column: str) -> str:
    """Name an image by its number, its file or its bytes, the same in every epoch."""
    image = row[column]
    path = image.get("path") if isinstance(image, Mapping) else image if isinstance(image, str) else None
    data = image.get("bytes") if isinstance(image, Mapping) else image
    if "index" in row:
        return f"row {row['index']}"
    if path:
        return f"file {os.path.basename(path)}"
    if isinstance(data, bytes | bytearray | memoryview):
        return f"bytes with sha256 {hashlib.sha256(data).hexdigest()[:16]}"
    return type(image).__name__


def _shortened(path: Any) -> str:
    text = repr(os.fspath(path))
    return text if len(text) <= 250 else f"{text[:120]}...{text[-120:]}"


def _open(source: Any) -> PIL.Image.Image:
    if isinstance(source, bytes | bytearray | memoryview):
        return _identified(bytes(source))
    path = os.fspath(source)
    if path.startswith("hf://") or "::" in path:  # files of a streamed Hub dataset, perhaps inside an archive
        import fsspec  # type: ignore[import-untyped]

        with fsspec.open(path, "rb") as file:
            return _identified(file.read())
    status = os.stat(path)
    mode = status.st_mode
    if not stat.S_ISREG(mode):  # a pipe or a device could be read for ever
        raise ValueError("expected a file, got a folder" if stat.S_ISDIR(mode) else "expected a file, got a device")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"expected at most {MAX_FILE_BYTES:,} bytes, got {status.st_size:,}")
    return _identified(Path(path).read_bytes())  # PIL would keep files of many frames open


def _identified(data: bytes) -> PIL.Image.Image:
    if not data:
        raise ValueError("expected an encoded image, got an empty file")
    if data.startswith(_PNG):
        data = _without_damaged_extras(data)
    try:
        return PIL.Image.open(io.BytesIO(data))
    except PIL.UnidentifiedImageError as error:
        found = next((kind for start, kind in _SIGNATURES.items() if data.startswith(start)), "data of another kind")
        raise ValueError(f"expected an encoded image (JPEG, PNG, ...), got {found}, or a damaged header") from error


def _without_damaged_extras(data: bytes) -> bytes:
    """Drop what a PNG file can do without, such as EXIF data, where its checksum is wrong: Pillow would refuse all."""
    kept, place, damaged = [data[: len(_PNG)]], len(_PNG), False
    while place + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        end = place + 12 + length
        is_extra = bool(kind[0] & 32)  # a small first letter: https://www.w3.org/TR/png-3/#5Chunk-naming-conventions
        if (
            is_extra
            and end <= len(data)
            and zlib.crc32(data[place + 4 : end - 4]).to_bytes(4, "big") != data[end - 4 : end]
        ):
            damaged = True
        else:
            kept.append(data[place:end])
        place = end
    return b"".join(kept) if damaged else data


__all__ = ["ImageCollator", "check_resized", "decode_image", "eight_bit_rgb", "read_rgb"]
