"""Several teachers of one student must look at the same part of a picture, each in its own way.

Many teachers resize the short side and crop the centre, others squeeze the whole picture into a square. The student is
asked about a place in the part that its main teacher sees; a further teacher must mean the same place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from .teachers import Teacher


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
