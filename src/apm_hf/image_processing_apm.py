"""Process images with torchvision, for tensors, batches and GPUs; with PIL if torchvision is missing.

Options, defaults, reading and errors are those of `image_processing_pil_apm`, and so are the results, up to the
resampling of the two libraries (about one 8-bit level). Built on
https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/image_processing_backends.py

Legend: B images, C channels, (H, W) the input's and (S_h, S_w) the output's height and width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import SizeDict
from transformers.utils import is_torchvision_available

from .image_processing_pil_apm import APMImageProcessorBase, APMImageProcessorKwargs, APMImageProcessorPil


class APMImageProcessor(APMImageProcessorBase, TorchvisionBackend):
    """Turn images into APM's `pixel_values` `(B, C, S_h, S_w)`, float32, with torchvision.

    Accepts the same inputs and options as [`APMImageProcessorPil`]. Tensors stay on their device unless
    `device` is given; images of one size are processed together there (`disable_grouping=False` does so on the CPU).
    """

    valid_kwargs = APMImageProcessorKwargs

    def process_image(self, image: Any, *, device: torch.device | str | None = None, **options: Any) -> Tensor:
        """Read one image as `(C, H, W)`, `uint8` or `float32`; see [`read_image`]."""
        pixels = self.read(image, **options).contiguous()
        return pixels if device is None else pixels.to(device)

    def resize(self, image: Tensor, size: SizeDict, resample: Any = None, **kwargs: Any) -> Tensor:
        """Resize `(N, C, H, W)`; deeper images are clamped like 8-bit ones, against bicubic overshoots at edges."""
        resized = super().resize(image, size, resample=resample, **kwargs)
        if not resized.is_floating_point():
            return resized
        white = torch.where(image.amax(dim=(1, 2, 3), keepdim=True) <= 1, 1.0, 255.0)  # (N, 1, 1, 1)
        return resized.clamp(min=0).minimum(white)

    def min_max(self, images: Tensor) -> Tensor:
        """Scale every image of `(N, C, H, W)` to [0, 1] by its minimum and maximum; zeros if they are equal."""
        images = images.to(torch.float32)
        low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)  # (N, 1, 1, 1)
        return (images - low) / torch.where(high > low, high - low, 1)

    def _preprocess(
        self,
        images: list[Tensor],
        *,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        do_min_max: bool,
        do_flip_channel_order: bool,
        do_pad: bool | None = None,
        pad_size: SizeDict | None = None,
        disable_grouping: bool | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if len({image.dtype for image in images}) > 1:
            disable_grouping = True  # stacking would promote 8-bit images, which resize differently as floats
        groups, places = group_images_by_shape(images, disable_grouping=disable_grouping)
        if do_resize:
            groups = {key: self.resize(stack, size, resample=resample) for key, stack in groups.items()}
        for key, stack in groups.items():  # (N, C, H, W)
            if do_center_crop:
                stack = self.center_crop(stack, crop_size)
            if do_min_max:
                stack = self.min_max(stack)
            else:
                stack = self.rescale_and_normalize(
                    stack, do_rescale, rescale_factor, do_normalize, image_mean, image_std
                )
            if do_flip_channel_order:
                stack = stack.flip(1)  # RGB -> BGR
            groups[key] = stack.to(torch.float32)
        pixel_values = reorder_images(groups, places)
        if do_pad:
            pixel_values = self.pad(pixel_values, pad_size=pad_size, disable_grouping=disable_grouping)
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)


if not is_torchvision_available():
    APMImageProcessor = APMImageProcessorPil  # type: ignore[misc]

APMImageProcessor.register_for_auto_class()  # saved processors include their code

__all__ = ["APMImageProcessor"]
