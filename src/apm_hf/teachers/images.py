"""Prepare pixels for a teacher, and replace image processors that lack the usual options.

Students get the part of an image that their teacher gets, views are not resized again, complete photos are resized
without a crop: all of this uses the usual options of the teacher's image processor (`size`, `do_resize`,
`do_center_crop`, `crop_size`). Processors without them are replaced by an equivalent one of CLIP's.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging

from ..data.images import check_resized, eight_bit_rgb

logger = logging.get_logger(__name__)

_WARPED_FROM = 384  # ConvNeXt's processor crops below this size and resizes to a square from it on


def rgb_images(images: Any) -> list[Image.Image]:
    """Convert one image or many, of any kind that `Teacher.encode_images` takes, to upright RGB images.

    Raises:
        ValueError: No images, or something that is not an image (naming its index).
    """
    is_batch = isinstance(images, list | tuple) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 4)
    images = list(images) if is_batch else [images]
    if not images:
        raise ValueError("Expected at least one image, got none.")
    return [_to_rgb(image, index) for index, image in enumerate(images)]


def _to_rgb(image: Any, index: int) -> Image.Image:
    if isinstance(image, np.ndarray | Tensor) and image.dtype not in (np.uint8, torch.uint8):
        raise ValueError(
            f"Image {index}: expected an array of uint8, 0 to 255, got {image.dtype}; "
            "pass the output of an image processor as `pixel_values`."
        )
    try:
        return eight_bit_rgb(image)
    except ValueError as error:
        raise ValueError(f"Image {index}: {error}") from error


def process(image_processor: Any, images: list[Image.Image]) -> Tensor:
    """Return the pixel values of images, `(B, 3, H, W)`."""
    for image in images:
        check_resized(image_processor, image)
    return image_processor(images=images, return_tensors="pt")["pixel_values"]


def square_side(image_processor: Any, side: int) -> int:
    """Return the side in pixels of the processor's output for a square image of the given side."""
    sides = set(process(image_processor, [Image.new("RGB", (side, side))]).shape[-2:])
    if len(sides) != 1:
        raise ValueError(f"Expected a teacher with square images, got {sides} from its image processor.")
    return int(sides.pop())


def fitted(image_processor: Any, patch_size: int, *, side: int) -> Any:
    """Return the processor or, if its squares are no multiple of the patch size, one for the next smaller multiple.

    Such teachers (SigLIP at 384 pixels with patches of 14, EfficientNet at 300) drop or pad pixels at two edges, so
    that their features would be at other positions than the student is queried at.

    Args:
        patch_size: In pixels.
        side: Side of a square image to try the processor on, in pixels.

    Raises:
        ValueError: If its size cannot be changed.
    """
    made = square_side(image_processor, side)
    if made % patch_size == 0:
        return image_processor
    smaller_side = made // patch_size * patch_size
    name = "crop_size" if getattr(image_processor, "do_center_crop", False) else "size"
    size = dict(getattr(image_processor, name, None) or {})
    if smaller_side and size and hasattr(image_processor, "to_dict"):
        sides = {key: smaller_side for key, value in size.items() if value}
        smaller = type(image_processor).from_dict(image_processor.to_dict() | {name: sides})
        if square_side(smaller, side) == smaller_side:
            logger.warning_once(
                f"The image processor makes {made} pixels, no multiple of the patch size {patch_size}: "
                f"it now makes {smaller_side}, so that the grid covers the image."
            )
            return smaller
    raise ValueError(
        f"image_processor: expected one that makes multiples of the patch size {patch_size}, got {made} pixels"
    )


def plain_image_processor(image_processor: Any) -> Any:
    """Return the processor, or an equivalent one of CLIP's that has the usual options.

    * ConvNeXt's (ResNet and RegNet use it too) crops by `crop_pct` below 384 pixels, and resizes to a square above.
    * timm's is a list of transforms without options.
    * SigLIP 2 NaFlex's makes as many patches as fit: here the largest square of them; `pixel_values` may have any
      shape.

    Raises:
        ValueError: If timm's transforms crop in another way.
    """
    kind = type(image_processor).__name__
    if kind.startswith("TimmWrapper"):
        return _from_timm(image_processor.data_config)
    if kind.startswith("ConvNext"):
        side = dict(image_processor.size)["shortest_edge"]
        if side >= _WARPED_FROM:
            return _like(image_processor, size={"height": side, "width": side}, do_center_crop=False)
        size, crop = {"shortest_edge": int(side / image_processor.crop_pct)}, {"height": side, "width": side}
        return _like(image_processor, size=size, do_center_crop=True, crop_size=crop)
    if kind.startswith("Siglip2"):
        side = math.isqrt(image_processor.max_num_patches) * image_processor.patch_size
        return _like(image_processor, size={"height": side, "width": side}, do_center_crop=False)
    return image_processor


def _like(image_processor: Any, **sizes: Any) -> Any:
    names = ("resample", "image_mean", "image_std", "do_resize", "do_rescale", "rescale_factor", "do_normalize")
    options = {name: getattr(image_processor, name) for name in names} | sizes
    if isinstance(image_processor, PilBackend):
        return CLIPImageProcessorPil(**options)
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor  # the backend with torchvision

    return CLIPImageProcessor(**options)


def _from_timm(data: Mapping[str, Any]) -> Any:
    """Return the equivalent of `timm.data.create_transform` for evaluation."""
    _, height, width = data["input_size"]
    crop, mode = {"height": height, "width": width}, data.get("crop_mode") or "center"
    if mode == "center" and height == width:
        size = {"shortest_edge": math.floor(height / data["crop_pct"])}
    elif mode == "squash":
        size = {name: math.floor(side / data["crop_pct"]) for name, side in crop.items()}
    else:
        raise ValueError(
            f"image_processor: expected timm's crop_mode 'center' with square images, or 'squash', got {mode!r} and "
            f"{height} x {width} pixels; give load_teacher an image_processor"
        )
    return CLIPImageProcessorPil(  # timm resizes PIL images, not tensors
        size=size,
        crop_size=crop,
        resample=Image.Resampling[data["interpolation"].upper()],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )
