"""From whatever a row holds to a picture, and from rows to a batch.

Legend: B rows in a batch, (S_h, S_w) a processor's output height and width.
"""

import io
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from ..image_processing_pil_apm import read_image


def decode_image(value: Any) -> PIL.Image.Image:
    """Decode a PIL image, `{"bytes", "path"}`, encoded bytes or a path into an upright PIL image of its own mode.

    Raises:
        ValueError: missing, empty, truncated or damaged data, or an image beyond PIL's decompression limit.
    """
    path = None
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
        value = path if value is None else value
    if isinstance(value, PIL.Image.Image):
        what = f"a PIL image of mode {value.mode}"
    elif isinstance(value, bytes | bytearray | memoryview):
        what = f"{len(value)} bytes" + (f" of {path!r}" if path else "")
    elif isinstance(value, str | os.PathLike):
        what = repr(os.fspath(value))
    else:
        raise ValueError(
            f"expected a PIL image, encoded bytes, a path or a dict of those, got {type(value).__name__}."
        )
    try:
        image = PIL.ImageOps.exif_transpose(value if isinstance(value, PIL.Image.Image) else _open(value))
        image.load()
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ValueError(f"cannot decode {what}: {error or type(error).__name__}") from error
    return image


def eight_bit_rgb(image: Any) -> PIL.Image.Image:
    """Any image that [`read_image`] reads, as an upright 8-bit RGB picture, transparency on white.

    Raises:
        ValueError: what was expected and what came.
    """
    pixels = read_image(image).round().to(torch.uint8)
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())  # (3, H, W) -> (H, W, 3)


@dataclass
class ImageCollator:
    """Make a batch of dataset rows, for `torch.utils.data.DataLoader(collate_fn=...)`.

    Calling it with B rows returns `pixel_values` `(B, 3, S_h, S_w)`, `teacher_pixel_values` likewise if there is a
    teacher's processor, `teacher_pixel_values.NAME` for every further teacher's, `labels` `(B,)` int64 if there is a
    label column, and `index` `(B,)` int64 if the rows have such a column. Teachers' processors see the same picture as
    8-bit RGB, since few handle other modes well.

    Attributes:
        image_processor: the student's.
        image_column: as in [`ImageData`].
        label_column: as in [`ImageData`]; `None` leaves labels out.
        teacher_image_processor: the teacher's, if it is to run in this batch.
        teacher_image_processors: further teachers', by the names of their heads.

    Raises:
        ValueError: an unreadable image or a label that is no integer; the message names the row.
    """

    image_processor: Any
    image_column: str = "image"
    label_column: str | None = None
    teacher_image_processor: Any = None
    teacher_image_processors: Mapping[str, Any] = field(default_factory=dict)

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
        image = decode_image(row[self.image_column])
        example = {
            "pixel_values": self.image_processor(image, return_tensors="pt")["pixel_values"]
        }  # (1, 3, S_h, S_w)
        processors = {f"teacher_pixel_values.{name}": one for name, one in self.teacher_image_processors.items()}
        if self.teacher_image_processor is not None:
            processors["teacher_pixel_values"] = self.teacher_image_processor
        rgb_image = eight_bit_rgb(image) if processors else None
        for key, processor in processors.items():
            example[key] = processor(rgb_image, return_tensors="pt")["pixel_values"]
        if self.label_column is not None:
            label: Any = row.get(self.label_column)
            try:
                example["labels"] = operator.index(label)
            except TypeError as error:
                raise ValueError(f"expected an integer in column {self.label_column!r}, got {label!r}.") from error
        if "index" in row:
            example["index"] = row["index"]
        return example


def _open(source: Any) -> PIL.Image.Image:
    if isinstance(source, bytes | bytearray | memoryview):
        return PIL.Image.open(io.BytesIO(source))
    path = os.fspath(source)
    if path.startswith("hf://") or "::" in path:  # files of a streamed Hub dataset, perhaps inside an archive
        import fsspec  # type: ignore[import-untyped]

        with fsspec.open(path, "rb") as file:
            return PIL.Image.open(io.BytesIO(file.read()))
    return PIL.Image.open(io.BytesIO(Path(path).read_bytes()))  # PIL would keep files of many frames open


__all__ = ["ImageCollator", "decode_image", "eight_bit_rgb"]
