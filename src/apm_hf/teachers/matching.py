"""Match image processors, so that a student and its teachers get the same part of an image.

Many teachers resize the short side and crop the centre, others resize the complete image to a square. With another
part of the image, the student's locations would not correspond to the teacher's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..image_processing_apm import APMImageProcessor
from ..modeling_apm import FINER
from . import Teacher


def matching_image_processor(teacher: Teacher, image_size: int, **options: Any) -> Any:
    """Return an image processor that gives a student the same part of the image as its teacher.

    Many teachers resize the short side and crop the centre. With the complete image, the student's locations would not
    correspond to the teacher's.

    Args:
        image_size: side of the student's input, in pixels.
        **options: options of [`APMImageProcessor`], e.g. `do_min_max=True`.
    """
    reference = teacher.image_processor
    scale = image_size / teacher.image_size
    crop = bool(getattr(reference, "do_center_crop", False))
    size: dict[str, int] = {"height": image_size, "width": image_size}
    if crop:
        size = {name: round(side * scale) for name, side in dict(reference.size).items() if side}
        options = {"do_center_crop": True, "crop_size": {"height": image_size, "width": image_size}, **options}
    return APMImageProcessor(size=size, **options)


def dense_image_processor(teacher: Teacher) -> APMImageProcessor:
    """Return a dense student's image processor: whole photos at twice the teacher's side, normalised as for it."""
    reference, side = teacher.image_processor, FINER * teacher.image_size
    options: dict[str, Any] = {"size": {"height": side, "width": side}}
    for name in ("resample", "rescale_factor", "do_rescale", "do_normalize", "image_mean", "image_std"):
        if (value := getattr(reference, name, None)) is not None:
            options[name] = value
    return APMImageProcessor(**options)


def same_view(teacher: Teacher, main: Teacher) -> Callable[..., Any]:
    """Return a processor with `teacher`'s normalisation and size for the part of the image that `main` gets.

    Returns:
        A callable with the image processor's arguments, e.g. for `ImageCollator(teacher_image_processors=...)`.
    """
    reference, side = main.image_processor, teacher.image_size
    square = {"height": side, "width": side}
    options: dict[str, Any] = {"do_resize": True, "size": square, "do_center_crop": False}
    if getattr(reference, "do_center_crop", False):
        scale = side / main.image_size
        size = {name: round(length * scale) for name, length in dict(reference.size).items() if length}
        options = {"do_resize": True, "size": size, "do_center_crop": True, "crop_size": square}
    return partial(teacher.image_processor, **options)
