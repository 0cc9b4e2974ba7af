"""A student and its teachers must look at the same part of a picture, each in its own way.

Many teachers resize the short side and crop the centre, others squeeze the whole picture into a square. A student that
saw another part would be asked about places that its teacher means otherwise.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..image_processing_apm import APMImageProcessor
from . import Teacher


def matching_image_processor(teacher: Teacher, image_size: int, **options: Any) -> Any:
    """A student's image processor that shows it just the part of the picture that its teacher sees.

    Many teachers resize the short side and crop the centre. A student that saw the whole picture would be asked about
    places that its teacher means otherwise.

    Args:
        image_size: side of the student's input, in pixels.
        **options: of [`APMImageProcessor`], e.g. `do_min_max=True`.
    """
    theirs = teacher.image_processor
    scale = image_size / teacher.image_size
    crop = bool(getattr(theirs, "do_center_crop", False))
    size: dict[str, int] = {"height": image_size, "width": image_size}
    if crop:
        size = {name: round(side * scale) for name, side in dict(theirs.size).items() if side}
        options = {"do_center_crop": True, "crop_size": {"height": image_size, "width": image_size}, **options}
    return APMImageProcessor(size=size, **options)


def same_view(teacher: Teacher, main: Teacher) -> Callable[..., Any]:
    """`teacher.image_processor`, its normalisation and its size, on the part of the picture that `main` sees.

    Returns:
        A callable with the image processor's arguments, e.g. for `ImageCollator(teacher_image_processors=...)`.
    """
    theirs, side = main.image_processor, teacher.image_size
    square = {"height": side, "width": side}
    options: dict[str, Any] = {"do_resize": True, "size": square, "do_center_crop": False}
    if getattr(theirs, "do_center_crop", False):
        scale = side / main.image_size
        size = {name: round(length * scale) for name, length in dict(theirs.size).items() if length}
        options = {"do_resize": True, "size": size, "do_center_crop": True, "crop_size": square}
    return partial(teacher.image_processor, **options)
