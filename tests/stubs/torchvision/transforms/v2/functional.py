import torch
from torch.nn import functional as F

from torchvision.transforms.functional import InterpolationMode, pil_to_tensor

__all__ = ["InterpolationMode", "pil_to_tensor"]


def resize(image, size, interpolation=InterpolationMode.BILINEAR, antialias=True):
    if list(image.shape[-2:]) == list(size):
        return image
    smooth = interpolation in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
    options = {"align_corners": False, "antialias": antialias} if smooth else {}
    shape = image.shape
    pixels = image.reshape(-1, 1, *shape[-2:]) if image.ndim != 4 else image
    resized = F.interpolate(pixels, size=tuple(size), mode=interpolation.value, **options)
    return resized.reshape(*shape[:-2], *resized.shape[-2:])


def normalize(image, mean, std, inplace=False):
    mean, std = (torch.as_tensor(x, dtype=image.dtype, device=image.device).view(-1, 1, 1) for x in (mean, std))
    return (image - mean) / std


def pad(image, padding, fill=0, padding_mode="constant"):
    left, top, right, bottom = padding
    return F.pad(image, (left, right, top, bottom), mode=padding_mode, value=fill or 0)


def crop(image, top, left, height, width):
    bottom, right = max(0, top + height - image.shape[-2]), max(0, left + width - image.shape[-1])
    above, before = max(0, -top), max(0, -left)
    padded = F.pad(image, (before, right, above, bottom))
    return padded[..., top + above : top + above + height, left + before : left + before + width]


def center_crop(image, output_size):
    height, width = output_size
    return crop(image, (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2, height, width)


def to_dtype(image, dtype, scale=False):
    if scale and not image.is_floating_point() and dtype.is_floating_point:
        return image.to(dtype) / torch.iinfo(image.dtype).max
    return image.to(dtype)


def grayscale_to_rgb(image):
    return image.expand(*image.shape[:-3], 3, *image.shape[-2:]) if image.shape[-3] == 1 else image
