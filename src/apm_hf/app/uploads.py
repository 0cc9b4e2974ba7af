"""Read what visitors give, photos and labels. Every error is one sentence for the person at the page.

A photo comes as the path under which Gradio stored the upload, which holds a hash that nobody else can guess. A
request may name any other path: nothing outside of the upload folder is opened, and the message is the same whether
there is such a file or not. Photos are decoded in a process of their own ([`decode`]), which can be ended.
"""

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.images import eight_bit_rgb
from . import decode

MAX_LABELS, MAX_LABEL_LENGTH = 30, 60
GONE = "This photo is not here (any more): please upload it again."
_MAX_SECONDS = 10  # that a photo may take, waiting for a processor included
_DECODERS = threading.BoundedSemaphore(2)  # photos decoded at a time: each may take `decode.MAX_BYTES` of memory
_UNUSUAL = "This picture is damaged or of an unusual kind: please upload another one."
_REFUSED = {
    decode.TOO_LARGE: f"This picture has more than {decode.MAX_MEGAPIXELS} megapixels: please upload a smaller one.",
    decode.UNREADABLE: "This file cannot be read as a picture: please upload a JPEG, PNG or WebP.",
    decode.DAMAGED: _UNUSUAL,
}
_TOO_SLOW = "This picture takes too long to read: please upload a smaller one, as JPEG, PNG or WebP."


@dataclass(frozen=True)
class Uploads:
    """Read the photos that visitors uploaded.

    Args:
        folder: where Gradio stores them; nothing else is read.
    """

    folder: str | os.PathLike[str]

    def read(self, path: str | None) -> Image.Image:
        """Return an upright 8-bit RGB photo, of at most `decode.LONGEST` pixels along its longer side.

        Raises:
            ValueError: for no photo, a path that is no upload, a file that cannot be read, one that takes too long,
                or more than `decode.MAX_MEGAPIXELS`.
        """
        header, data = self._decode("pixels", path)
        try:
            return eight_bit_rgb(Image.frombytes(header["mode"], tuple(header["size"]), data))
        except ValueError as error:
            raise ValueError(_UNUSUAL) from error

    def shown_size(self, path: str | None) -> tuple[int, int]:
        """Return (width, height) in pixels of a photo as a browser shows it: turned as its camera says.

        Raises:
            ValueError: as [`Uploads.read`] does.
        """
        width, height = self._decode("size", path)[0]["size"]
        return width, height

    def _decode(self, what: str, path: str | None) -> tuple[dict[str, Any], bytes]:
        if path is None:
            raise ValueError("There is no photo yet: please upload one or choose a scene.")
        descriptor = self._open(path)
        try:
            # -P: modules beside the script are none of its own.
            command = [sys.executable, "-P", decode.__file__, what]
            with _DECODERS:
                done = subprocess.run(command, stdin=descriptor, capture_output=True, timeout=_MAX_SECONDS)
        except subprocess.TimeoutExpired:
            raise ValueError(_TOO_SLOW) from None
        finally:
            os.close(descriptor)
        if done.returncode < 0:  # ended by the system: out of time
            raise ValueError(_TOO_SLOW)
        if done.returncode:
            raise ValueError(_REFUSED.get(done.returncode, _UNUSUAL))
        header, _, data = done.stdout.partition(b"\n")
        return json.loads(header), data

    def _open(self, path: str) -> int:
        """Open an upload for reading and return its descriptor; neither a pipe nor a device keeps anyone waiting."""
        folder = Path(os.path.abspath(self.folder))
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
        try:
            named = Path(os.path.abspath(path))
            if folder not in named.parents:  # before the disk is asked for anything
                raise ValueError(GONE)
            file = named.resolve(strict=True)
            if folder.resolve() not in file.parents:  # through a link
                raise ValueError(GONE)
            descriptor = os.open(file, flags | getattr(os, "O_BINARY", 0))
        except (OSError, ValueError, RuntimeError):  # gone, no name for a file, a circle of links
            raise ValueError(GONE) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ValueError(GONE)
        return descriptor


def read_labels(text: str | None) -> list[str]:
    """Split labels, one a line or with commas between them, and check them.

    Raises:
        ValueError: as [`check_labels`] does.
    """
    return check_labels((text or "").replace("\n", ",").split(","))


def check_labels(names: Sequence[str]) -> list[str]:
    """Return labels without surplus spaces; empty ones and those that occur again are left out.

    Raises:
        ValueError: for fewer than two, more than `MAX_LABELS`, or one longer than `MAX_LABEL_LENGTH`.
    """
    labels = list(dict.fromkeys(label for name in names if (label := " ".join(name.split()))))
    if len(labels) < 2:
        raise ValueError("Please write two labels at least, one a line or with commas between them.")
    if len(labels) > MAX_LABELS:
        raise ValueError(f"{len(labels)} labels are too many for this page: please write {MAX_LABELS} at most.")
    if longest := [label for label in labels if len(label) > MAX_LABEL_LENGTH]:
        raise ValueError(f"A label has {MAX_LABEL_LENGTH} characters at most; too long is: {longest[0][:30]}…")
    return labels
