"""Identify models and images by their contents: two that have the same digest give the same results."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image

from ..modeling_apm import weights_digest as weights_digest  # which stands alone: remote code needs it

EDGE = 4096  # bytes at either end of an encoded image that are read


def processor_settings(image_processor: Any) -> dict[str, Any]:
    """Return what decides on pixels; backends and versions, which change their last bits alone, are left out."""
    fields = image_processor.to_dict() if hasattr(image_processor, "to_dict") else {"class": type(image_processor)}
    names = ("image_processor_type", "feature_extractor_type", "processor_class", "transformers_version", "auto_map")
    kept = {name: value for name, value in fields.items() if not name.startswith("_") and name not in names}
    return json.loads(json.dumps({name: value for name, value in kept.items() if value is not None}, default=str))


def images_digest(images: Any, image_column: str) -> str:
    """Return the SHA-256 of the number of images and of each one's content, the same wherever the data set lies.

    Of an encoded image its length and both ends are read: enough to tell any two photos apart, and fast for a million.
    """
    digest = hashlib.sha256(str(len(images)).encode())
    for row in range(len(images)):
        digest.update(_content(images[row].get(image_column)))
    return digest.hexdigest()


def _content(value: Any) -> bytes:
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
        value = path if value is None else value
    if isinstance(value, PIL.Image.Image):
        return hashlib.sha256(value.tobytes()).digest()
    if isinstance(value, str | os.PathLike):
        if not os.path.isfile(value):  # a pipe would be waited for; who decodes it says what is wrong
            return b"unreadable"
        try:
            with open(Path(value), "rb") as file:
                size, start = os.fstat(file.fileno()).st_size, file.read(EDGE)
                file.seek(max(0, size - EDGE))
                return _ends(size, start, file.read(EDGE))
        except OSError:  # the decoder reports what is wrong
            return b"unreadable"
    if isinstance(value, bytes | bytearray | memoryview):
        return _ends(len(value), bytes(value[:EDGE]), bytes(value[-EDGE:]))
    return hashlib.sha256(repr(value).encode()).digest()


def _ends(size: int, start: bytes, end: bytes) -> bytes:
    return hashlib.sha256(str(size).encode() + start + end).digest()
