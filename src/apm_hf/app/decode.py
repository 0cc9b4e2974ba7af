"""Decode a picture of a visitor in a process of its own, with bounds on pixels, memory and time.

    python decode.py pixels < photo.jpg    # a line of JSON, {"mode": ..., "size": [width, height]}, then the pixels
    python decode.py size < photo.jpg      # {"size": [width, height]}, as a browser shows it

`uploads` runs this file as a script, so that it starts with Pillow alone, in a tenth of a second. The exit status says
why a picture was refused.
"""

import json
import sys
import warnings
from typing import IO

from PIL import ExifTags, Image, ImageOps

MAX_MEGAPIXELS = 50
MAX_SECONDS = 3  # of the processor's time
MAX_BYTES = 2**30  # of memory, Python and Pillow included; 50 megapixels with transparency take 600 MB on their way
# Pixels of the longer side that are kept: more than models see and than the page shows.
LONGEST = 1024
TOO_LARGE, UNREADABLE, DAMAGED = 10, 11, 12  # exit statuses
_DEEP = ("I", "F")  # modes of more than 8 bits, which Pillow would clip to 8
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")


def main() -> int:
    """Decode standard input to standard output; returns the exit status."""
    limit_process()
    # Also holds for the pictures inside of ICO and ICNS files, which Pillow checks before it decodes them.
    Image.MAX_IMAGE_PIXELS = MAX_MEGAPIXELS * 10**6
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    decode = {"pixels": pixels, "size": shown_size}[sys.argv[1]]
    try:
        image = open_picture(sys.stdin.buffer)
    except bombs:
        return TOO_LARGE
    except Exception:  # Pillow's decoders raise nearly anything on damaged files
        return UNREADABLE
    try:
        header, data = decode(image)
    except bombs:
        return TOO_LARGE
    except Exception:
        return DAMAGED
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + data)
    return 0


def limit_process() -> None:
    """Bound the memory and the time of this process, where the system can."""
    try:
        import resource
    except ImportError:  # Windows; the caller's time limit and the limit of pixels hold there
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def open_picture(file: IO[bytes]) -> Image.Image:
    """Read the header of a picture.

    Raises:
        ValueError: for EPS, a program, which Pillow would hand to Ghostscript; Pillow raises others.
    """
    image = Image.open(file)
    if image.format == "EPS":
        raise ValueError("expected a format of pixels, got EPS")
    return image


def pixels(image: Image.Image) -> tuple[dict[str, object], bytes]:
    """Return the upright picture, at most `LONGEST` pixels along its longer side, in mode RGB, RGBA, I or F."""
    image.draft(None, (2 * LONGEST, 2 * LONGEST))  # a JPEG is decoded at a fraction of its size
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = image.convert("I")
    if image.mode in _DEEP:
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.BILINEAR)  # never beyond the values that are there
    else:
        transparent = image.mode in _TRANSPARENT or "transparency" in image.info
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA" if transparent else "RGB")
        image.thumbnail((LONGEST, LONGEST), reducing_gap=2.0)
    return {"mode": image.mode, "size": image.size}, image.tobytes()


def shown_size(image: Image.Image) -> tuple[dict[str, object], bytes]:
    """Return (width, height) in pixels of the picture turned as its camera says."""
    width, height = image.size
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return {"size": (height, width) if turned else (width, height)}, b""


if __name__ == "__main__":
    sys.exit(main())
