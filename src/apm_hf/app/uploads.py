"""What comes from the page, checked: photos and labels. Every error is one sentence for the person at the page."""

from PIL import ExifTags, Image

from ..data.images import decode_image, eight_bit_rgb
from ..teachers import Teacher

MAX_MEGAPIXELS = 50
MAX_LABELS, MAX_LABEL_LENGTH = 30, 60
# Pixels of the longer side that are kept: more than models see and than the page shows.
_LONGEST = 1024
_SCALABLE = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")  # modes that Pillow scales down smoothly
_TOO_LARGE = f"This picture has more than {MAX_MEGAPIXELS} megapixels: please upload a smaller one."


def read_upload(path: str | None) -> Image.Image:
    """An upright 8-bit RGB photo, of 1024 pixels at most along its longer side.

    Raises:
        ValueError: for no photo, a file that cannot be read, or more than `MAX_MEGAPIXELS`.
    """
    if path is None:
        raise ValueError("There is no photo yet: please upload one or choose a scene.")
    try:
        with Image.open(path) as header:  # reads no pixels
            width, height = header.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(_TOO_LARGE) from error
    except FileNotFoundError as error:
        raise ValueError("This photo is no longer on the server: please upload it again.") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ValueError("This file cannot be read as a picture: please upload a JPEG, PNG or WebP.") from error
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise ValueError(_TOO_LARGE)
    try:
        image = decode_image(path)
        if image.mode in _SCALABLE:
            image.thumbnail((_LONGEST, _LONGEST), reducing_gap=2.0)
        image = eight_bit_rgb(image)
    except ValueError as error:
        raise ValueError("This picture is damaged or of an unusual kind: please upload another one.") from error
    image.thumbnail((_LONGEST, _LONGEST))
    return image


def shown_size(path: str) -> tuple[int, int]:
    """(width, height) in pixels of a photo as a browser shows it: turned as its camera says."""
    with Image.open(path) as header:
        width, height = header.size
        turned = header.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if turned else (width, height)


def read_labels(text: str | None) -> list[str]:
    """Labels, one a line or with commas between them; those that occur again are left out.

    Raises:
        ValueError: for fewer than two, more than `MAX_LABELS`, or one longer than `MAX_LABEL_LENGTH`.
    """
    parts = (text or "").replace("\n", ",").split(",")
    labels = list(dict.fromkeys(label for part in parts if (label := " ".join(part.split()))))
    if len(labels) < 2:
        raise ValueError("Please write two labels at least, one a line or with commas between them.")
    if len(labels) > MAX_LABELS:
        raise ValueError(f"{len(labels)} labels are too many for this page: please write {MAX_LABELS} at most.")
    if longest := [label for label in labels if len(label) > MAX_LABEL_LENGTH]:
        raise ValueError(f"A label has {MAX_LABEL_LENGTH} characters at most; too long is: {longest[0][:30]}…")
    return labels


def unknown_labels(teacher: Teacher, labels: list[str]) -> list[str]:
    """Labels with words that the teacher's tokenizer has no token for: it cannot tell them from other such words."""
    tokenizer = teacher.tokenizer
    unknown = None if tokenizer is None else tokenizer.unk_token_id
    if unknown is None:
        return []
    return [label for label in labels if unknown in tokenizer(label)["input_ids"]]
