"""Process images with PIL and NumPy, and read images of any kind for both backends.

The recipe (arXiv:2410.20535): RGB, 448 x 448 bicubic, then either ImageNet mean and std (test-time training) or each
image scaled to [0, 1] by its minimum and maximum (`do_min_max`, grid distillation on COCO), channels optionally in
BGR order. Built on https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/image_processing_backends.py

How pixels are read (`read_image`); the type determines the scale if possible:

* 8-bit PIL modes, `uint8`, `bool` (False 0, True 255), other integers within [0, 255]: 8-bit values, kept as `uint8`.
* 16-bit: PIL modes `I;16*` and `I` (what PIL opens 16-bit files as) and `uint16`: divided by 257, never clipped.
* Floating point and PIL mode `F`: fractions of full scale if the maximum is at most 1 (multiplied by 255), 8-bit
  values if it lies in [2, 255]. Rounding errors of 0.1 % beyond a range are clamped; anything else is a ValueError.
  With `do_rescale=False` fractions are unchanged, as elsewhere in transformers.
* EXIF orientation is applied, where it can be read.

`image_mean` and `image_std` have an entry for each of the C output channels; a single number means three:

* C = 3, RGB: transparency is composited on white, one channel repeated; four channels of an array are RGBA.
* C = 1, grey: as in PIL's mode `L`, transparency on white.
* Any other C: the image must have as many channels; none of them is treated as transparency.
* `do_convert_rgb=False` converts nothing: the image must have C channels, or any number if C is not given by entries
  or nothing is normalized.

Label maps are supported both ways: `segmentation_maps` become `labels` as the image becomes `pixel_values`, and
`post_process_semantic_segmentation` maps a model's output back to the image.

Legend: B images, C channels, (H, W) the input's and (S_h, S_w) the output's height and width, K classes.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    load_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack

# Tells `AutoImageProcessor` where both backends are in a folder or repository with these files.
BACKENDS = {
    "torchvision": "image_processing_apm.APMImageProcessor",
    "pil": "image_processing_pil_apm.APMImageProcessorPil",
}
CONVERTIBLE = (1, 3, 4)  # channels of images that become grey or RGB
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # red, green and blue in PIL's mode L, ITU-R 601-2
MODES_WITH_ALPHA = ("LA", "PA", "RGBA", "RGBa")
FLOAT_SLACK = 1e-3  # share of full scale that interpolation and half precision may add to a correct image
IGNORE_INDEX = 255  # no label, as for the models' losses
STRIP_ELEMENTS = 2**24  # logits resized at a time, so that a photo with many classes fits into memory


class APMImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Describe the options of APM's image processors: those of every image processor in transformers and two more.

    Attributes:
        do_min_max (`bool`, defaults to `False`):
            Scale every image to [0, 1] by its minimum and maximum over all pixels and channels, after resizing and
            cropping: `(x - min) / (max - min)`; a constant image becomes zeros. It replaces `do_rescale` and
            `do_normalize`, which have no effect while it is on.
        do_flip_channel_order (`bool`, defaults to `False`):
            Return the channels as blue, green, red. This is the last step, so `image_mean` and `image_std` are in RGB
            order in either case.
    """

    do_min_max: bool | None
    do_flip_channel_order: bool | None


def read_image(
    image: Any,
    *,
    input_data_format: str | ChannelDimension | None = None,
    do_convert_rgb: bool = True,
    do_rescale: bool = True,
    num_channels: int | None = 3,
) -> Tensor:
    """Read one PIL image, array or tensor by the rules at the top of this file.

    Args:
        image: a PIL image of any mode, or a NumPy array or torch tensor `(H, W)`, `(H, W, C)` or `(C, H, W)`.
        input_data_format: `"channels_first"` or `"channels_last"`. Without it the channels are the axis that has an
            accepted number of entries; if both ends do, as in `(3, 40, 4)`, the first axis is taken and a warning
            logged. Accepted are 1, 3 and 4 if the image is converted or `num_channels` is None.
        do_convert_rgb: convert to RGB or grey; otherwise the image must already have the output channels.
        do_rescale: whether a rescaling by 1/255 follows; otherwise floating-point fractions stay in [0, 1].
        num_channels: C, the output channels: 3 is RGB, 1 grey, other numbers are not converted to. None, without
            `do_convert_rgb`, takes any number.

    Returns:
        `(C, H, W)` on the image's device: `uint8`, or `float32` in [0, 255] for deeper images ([0, 1] for fractions
        with `do_rescale=False`).

    Raises:
        ValueError: for anything that is not such an image; the message has what was expected and given.
    """
    if isinstance(image, PIL.Image.Image):
        image, input_data_format = _pil_to_array(image, do_convert_rgb), ChannelDimension.LAST
    if isinstance(image, np.ndarray):
        image = _array_to_tensor(image)
    if not isinstance(image, Tensor):
        raise ValueError(f"expected a PIL image, NumPy array or torch tensor, got {type(image).__name__}.")
    convert = do_convert_rgb and num_channels in (1, 3)
    accepted = CONVERTIBLE if convert else None if num_channels is None else (num_channels,)
    pixels, white = _scale_pixels(_channels_first(image.detach(), input_data_format, accepted), do_rescale)
    return _convert_channels(pixels, white, num_channels) if convert else pixels


def _convert_channels(pixels: Tensor, white: float, num_channels: int | None) -> Tensor:
    """Convert grey, RGB or RGBA pixels `(1, 3 or 4, H, W)` in [0, white] to grey or RGB, `(1 or 3, H, W)`."""
    if len(pixels) == num_channels:
        return pixels
    if len(pixels) == 1:
        return pixels.expand(3, -1, -1)  # (1, H, W) -> (3, H, W)
    colours = pixels[:3].float()
    if len(pixels) == 4:
        colours = white - pixels[3:].float() / white * (white - colours)
    if num_channels == 1:
        colours = (colours * colours.new_tensor(LUMA)[:, None, None]).sum(dim=0, keepdim=True)
    return colours if pixels.is_floating_point() else (colours + 0.5).to(torch.uint8)


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turn a PIL image as its EXIF orientation says; what cannot be read as an orientation means none."""
    try:
        return PIL.ImageOps.exif_transpose(image)
    except Exception:  # of damaged EXIF data; what is wrong with the pixels is found when they are loaded
        return image


def _pil_to_array(image: PIL.Image.Image, do_convert_rgb: bool) -> np.ndarray:
    """Return upright pixels `(H, W)` or `(H, W, C)` at their depth; converted, RGBA if any may be transparent."""
    if 0 in image.size:
        raise ValueError(f"expected at least one pixel, got a PIL image of size {image.size}.")
    try:
        image = upright(image)
        image.load()
    except Exception as error:  # Pillow's decoders raise nearly any exception on damaged files
        raise ValueError(f"expected a readable image, got one that PIL cannot decode: {error}") from error
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL's conversion to 8 bits would clip at 255.
        array = np.array(image)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(
                f"expected 16-bit values in [0, 65535] in a PIL image of mode {image.mode}, "
                f"got [{array.min()}, {array.max()}]."
            )
        array = array.astype(np.uint16)
        if do_convert_rgb and isinstance(image.info.get("transparency"), int):
            array[array == image.info["transparency"]] = 65535
        return array
    if not do_convert_rgb and image.mode in ("P", "PA"):
        raise ValueError(f"expected pixels with `do_convert_rgb=False`, got palette indices, mode {image.mode}.")
    if do_convert_rgb and image.mode != "F":
        if image.mode == "La":
            image = image.convert("LA")
        has_alpha = image.mode in MODES_WITH_ALPHA or image.info.get("transparency") is not None
        image = image.convert("RGBA" if has_alpha else "RGB")
    return np.array(image)


def _array_to_tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "buif":
        raise ValueError(f"expected boolean, integer or floating-point pixels, got a NumPy array of {array.dtype}.")
    # torch supports neither negative strides nor foreign byte orders nor long doubles, and warns of read-only memory.
    dtype = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    array = np.ascontiguousarray(array, dtype=dtype)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _channels_first(
    image: Tensor, input_data_format: str | ChannelDimension | None, accepted: tuple[int, ...] | None
) -> Tensor:
    """Bring `(H, W)`, `(H, W, C)` or `(C, H, W)` to `(C, H, W)`; None accepts any C."""
    shape = tuple(image.shape)
    if image.ndim not in (2, 3):
        raise ValueError(f"expected shape (H, W), (H, W, C) or (C, H, W), or a batch with one axis more, got {shape}.")
    if 0 in shape:
        raise ValueError(f"expected at least one pixel, got shape {shape}.")
    counts, expected = accepted or CONVERTIBLE, "1, 3 or 4 channels"
    if counts != CONVERTIBLE:
        expected = f"{counts[0]} channel{'s' if counts[0] > 1 else ''} (as `image_mean` has entries)"
    if image.ndim == 2:
        image, layout = image[None], ChannelDimension.FIRST  # (H, W) -> (1, H, W)
    elif input_data_format is not None:
        layout = ChannelDimension(input_data_format)
    elif shape[0] in counts or shape[2] in counts:
        layout = infer_channel_dimension_format(image, num_channels=counts)
    else:
        raise ValueError(f"expected {expected} on the first or last axis, got shape {shape}.")
    pixels = image if layout == ChannelDimension.FIRST else image.permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
    if accepted and len(pixels) not in accepted:
        raise ValueError(f"expected {expected}, got {len(pixels)} in shape {shape} read as {layout.value}.")
    return pixels


def _scale_pixels(pixels: Tensor, do_rescale: bool) -> tuple[Tensor, float]:
    """Scale pixels to `uint8`, or to `float32` in [0, white]; return them and white, 255 or 1."""
    if pixels.dtype == torch.bool:
        return pixels.to(torch.uint8) * 255, 255.0
    if pixels.dtype == torch.uint8:
        return pixels, 255.0
    if pixels.dtype == torch.uint16:
        return pixels.to(torch.float32) / 257, 255.0
    if pixels.is_complex():
        raise ValueError(f"expected boolean, integer or floating-point pixels, got a tensor of {pixels.dtype}.")
    if not pixels.is_floating_point():
        low, high = (bound.item() for bound in pixels.to(torch.int64).aminmax())
        if low < 0 or high > 255:
            raise ValueError(
                f"expected integers in [0, 255], or 16-bit pixels as uint16, got {pixels.dtype} in [{low}, {high}]."
            )
        return pixels.to(torch.uint8), 255.0
    pixels = pixels.to(torch.float32)
    finite = pixels.isfinite()
    if not finite.all():
        raise ValueError(f"expected finite pixels, got {(~finite).sum().item()} NaN or infinite values.")
    low, high = (bound.item() for bound in pixels.aminmax())
    white = 1.0 if high < 2 else 255.0
    if low < -FLOAT_SLACK * white or high > (1 + FLOAT_SLACK) * white:
        raise ValueError(
            "expected floating-point pixels in [0, 1] or in [0, 255] with a maximum of at least 2, "
            f"got [{low:.4g}, {high:.4g}]."
        )
    pixels = pixels.clamp(0, white)
    return (pixels * 255, 255.0) if white == 1 and do_rescale else (pixels, white)


def _flatten(images: Any, label: str = "images") -> Iterator[tuple[str, Any]]:
    """Walk lists and 4-D batches, naming every image by its position: `("images[3]", image)`."""
    is_batch = isinstance(images, list | tuple) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 4)
    if not is_batch:
        yield label, images
        return
    if len(images) == 0:
        raise ValueError(f"{label}: expected at least one image, got none.")
    for index, image in enumerate(images):
        yield from _flatten(image, f"{label}[{index}]")


def _label_maps(maps: Any) -> list[np.ndarray]:
    """Convert one map, a batch or a list of them to `(rows, cols)` integers each."""
    if isinstance(maps, list | tuple) or getattr(maps, "ndim", 2) == 3:
        return [label_map for item in maps for label_map in _label_maps(item)]
    array = maps.detach().cpu().numpy() if isinstance(maps, Tensor) else np.asarray(maps)
    if array.ndim != 2 or array.dtype.kind not in "iub" or not array.size:
        raise ValueError(f"segmentation_maps: expected integers (rows, cols), got {array.dtype} {array.shape}.")
    return [array]


@dataclass(frozen=True)
class _VisibleSide:
    """Describe the visible range of one side of an image: `length` pixels from `start` on, of the `resized` ones."""

    start: int
    length: int
    resized: int

    def sources(self, size: int) -> np.ndarray:
        """Return `(length,)`: the cell, of `size` on the image, with each visible pixel's centre; may lie outside."""
        doubled = 2 * (self.start + np.arange(self.length)) + 1  # integers, since centres may fall on cells' borders
        return doubled * size // (2 * self.resized)

    def places(self, size: int) -> Tensor:
        """Return `(size,)`: centres of the image's `size` cells, relative to the visible range [-1, 1]; float64."""
        centres = (torch.arange(size, dtype=torch.float64) + 0.5) * self.resized / size
        return 2 * (centres - self.start) / self.length - 1


def _resized(logits: Tensor, y: Tensor, x: Tensor) -> Iterator[Tensor]:
    """Resize logits `(K, h, w)` bilinearly to rows `y` `(H,)` and columns `x` `(W,)`, in [-1, 1], in strips of rows.

    Yields:
        `(K, rows, W)`, float32; all rows together are H.
    """
    logits, y, x = logits[None].float(), y.to(logits.device, torch.float32), x.to(logits.device, torch.float32)
    for rows in y.split(max(1, STRIP_ELEMENTS // (logits.shape[1] * len(x)))):
        grid = torch.stack(torch.meshgrid(rows, x, indexing="ij")[::-1], dim=-1)  # grid_sample takes (x, y)
        yield F.grid_sample(logits, grid[None], padding_mode="border", align_corners=False)[0]


class APMImageProcessorBase(BaseImageProcessor):
    """Define the defaults, input checks and errors of both backends, which add `process_image` and `_preprocess`."""

    valid_kwargs = APMImageProcessorKwargs
    model_input_names = ["pixel_values"]
    do_resize = True
    size = {"height": 448, "width": 448}
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_convert_rgb = True
    do_min_max = False
    do_flip_channel_order = False

    def to_dict(self) -> dict[str, Any]:
        """Return the options; a saved processor can be loaded by either backend."""
        from .image_processing_apm import APMImageProcessor  # this import makes transformers save its file, too

        options = super().to_dict()
        if type(self) in (APMImageProcessor, APMImageProcessorPil):
            options["auto_map"] = {"AutoImageProcessor": dict(BACKENDS)}
        return options

    def fetch_images(self, image: Any) -> Any:
        """Open a path with PIL, so that its mode is kept; transformers fetches URLs and base64 text (as RGB)."""
        if isinstance(image, str | os.PathLike):
            try:
                if not os.path.isfile(image):
                    if os.path.exists(image):  # a folder, a pipe: the error below is about URLs
                        raise OSError("not a file")
                    return load_image(os.fspath(image))
                with open(image, "rb") as file:  # PIL would keep files with several frames open
                    return PIL.Image.open(io.BytesIO(file.read()))
            # The last is Pillow's for a decompression bomb, which is no system error.
            except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
                unknown = isinstance(error, PIL.UnidentifiedImageError)  # its message names a buffer, not the file
                reason = "PIL cannot identify its content" if unknown else str(error)[:300]
                raise ValueError(f"expected a readable image, got {str(image)[:200]!r}: {reason}") from error
        return image

    def read(self, image: Any, **options: Any) -> Tensor:
        """Read one image as `(C, H, W)`, `uint8` or `float32`, C as given by the options; see [`read_image`]."""
        means = [options.get(name) for name in ("image_mean", "image_std")]
        entries = [len(values) for values in means if isinstance(values, list | tuple)]
        num_channels, convert = entries[0] if entries else None, bool(options.get("do_convert_rgb"))
        if convert:
            num_channels = num_channels or 3
        elif options.get("do_min_max") or not options.get("do_normalize"):
            num_channels = None
        pixels = read_image(
            image,
            input_data_format=options.get("input_data_format"),
            do_convert_rgb=convert,
            do_rescale=bool(options.get("do_rescale", True)),
            num_channels=num_channels,
        )
        if options.get("do_flip_channel_order") and len(pixels) != 3:
            raise ValueError(f"expected 3 channels with `do_flip_channel_order=True`, got {len(pixels)}.")
        return pixels

    def _prepare_image_like_inputs(self, images: Any, *args: Any, expected_ndims: int = 3, **kwargs: Any) -> list[Any]:
        """Flatten the input into images `(C, H, W)`; errors name the image."""
        prepared: list[Any] = []
        for label, image in _flatten(images):
            try:
                pixels = self.process_image(self.fetch_images(image), **kwargs)
                if prepared and len(pixels) != (num_channels := len(prepared[0])):
                    raise ValueError(f"expected {num_channels} channels, as the first image has, got {len(pixels)}.")
                prepared.append(pixels)
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from error
        return prepared

    def preprocess(
        self, images: Any, segmentation_maps: Any = None, **kwargs: Unpack[APMImageProcessorKwargs]
    ) -> BatchFeature:
        """Convert images, and optionally label maps, to a model's inputs.

        Args:
            images: see the class.
            segmentation_maps: a map for every image, `(rows, cols)` integers at any resolution, as arrays, tensors or
                PIL images of one channel (with a palette: its indices); one map, a list, or a batch.
            **kwargs: options that replace the processor's.

        Returns:
            `pixel_values`; with maps also `labels` `(B, S_h, S_w)` int64, the label at every pixel's centre, and 255
            where a crop or padding extends beyond the image.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _preprocess_image_like_inputs(self, images: Any, segmentation_maps: Any = None, **kwargs: Any) -> BatchFeature:
        images = self._prepare_image_like_inputs(images, **kwargs)
        batch = self._preprocess(images, **kwargs)
        if segmentation_maps is None:
            return batch
        maps = _label_maps(segmentation_maps)
        if len(maps) != len(images):
            raise ValueError(f"segmentation_maps: expected one for each of {len(images)} images, got {len(maps)}.")
        labels = []
        for image, label_map in zip(images, maps, strict=True):
            sides = self._visible_sides(*image.shape[-2:], **kwargs)
            rows, cols = (side.sources(size) for side, size in zip(sides, label_map.shape, strict=True))
            visible = np.full((len(rows), len(cols)), IGNORE_INDEX, dtype=np.int64)
            inside = [(index >= 0) & (index < size) for index, size in zip((rows, cols), label_map.shape, strict=True)]
            visible[np.ix_(*inside)] = label_map[np.ix_(rows[inside[0]], cols[inside[1]])]
            labels.append(visible)
        return BatchFeature({**batch, "labels": labels}, tensor_type=kwargs.get("return_tensors"))

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Any = None,
        *,
        outside: int | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Any]:
        """Convert a model's outputs to label maps of the original images.

        Resizing, centre crop and padding are undone, by the processor's options; logits are resized bilinearly.

        Args:
            outputs: outputs of a model, with `logits` `(B, K, h, w)`.
            target_sizes: (height, width) of each image; None returns the maps at the logits' resolution.
            outside: label for pixels that the centre crop cut off, e.g. 255. None rejects images with such pixels:
                `pipeline("image-segmentation")` has names for the classes only.
            return_segmentation_scores: return the resized logits as well.

        Returns:
            B maps `(height, width)`, int64, on the logits' device; with scores B times a `BatchFeature` of such a
            `segmentation` and of `segmentation_scores` `(K, height, width)`, NaN for pixels outside.

        Raises:
            ValueError: unless there is one size per map, and for cut-off pixels without `outside`.
        """
        logits = outputs.logits
        if target_sizes is None:
            pairs = list(zip(logits.argmax(dim=1), logits, strict=True))
        elif len(target_sizes) == len(logits):
            sizes = [(int(height), int(width)) for height, width in target_sizes]
            pairs = [
                self._restore(image_logits, size, outside, return_segmentation_scores)
                for image_logits, size in zip(logits, sizes, strict=True)
            ]
        else:
            raise ValueError(f"target_sizes: expected {len(logits)} (height, width), got {len(target_sizes)}.")
        if not return_segmentation_scores:
            return [labels for labels, _ in pairs]
        return [BatchFeature({"segmentation": labels, "segmentation_scores": scores}) for labels, scores in pairs]

    def _restore(
        self, logits: Tensor, size: tuple[int, int], outside: int | None, with_scores: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Map logits `(K, h, w)` back to an image `(H, W)`: its labels `(H, W)` and, with scores, `(K, H, W)`."""
        options: dict[str, Any] = {name: getattr(self, name, None) for name in self._valid_kwargs_names}
        y, x = (side.places(cells) for side, cells in zip(self._visible_sides(*size, **options), size, strict=True))
        cropped = (y.abs() > 1)[:, None] | (x.abs() > 1)  # (H, W)
        if outside is None and cropped.any():
            raise ValueError(
                f"target_sizes: the centre crop cuts {int(cropped.sum())} pixels off a picture of {size}, which "
                "have no prediction; expected `outside`, the label to give them, or an image processor with "
                "do_center_crop=False whose `size` has a height and a width."
            )
        cropped, scores = cropped.to(logits.device), None
        labels = torch.cat([strip.argmax(dim=0) for strip in _resized(logits, y, x)])
        if with_scores:  # resized again, so that labels alone do not need memory for all classes
            scores = torch.cat(list(_resized(logits, y, x)), dim=1).masked_fill(cropped, torch.nan)
        return labels if outside is None else labels.masked_fill(cropped, outside), scores

    def _visible_sides(
        self,
        height: int,
        width: int,
        *,
        do_resize: bool | None,
        size: SizeDict,
        do_center_crop: bool | None,
        crop_size: SizeDict,
        do_pad: bool | None = None,
        pad_size: SizeDict | None = None,
        **kwargs: Any,
    ) -> tuple[_VisibleSide, _VisibleSide]:
        """Return the rows and columns of an image that reach the model: the geometry of `_preprocess`."""
        resized = self._resized_size(height, width, size) if do_resize else (height, width)
        if do_pad and pad_size is None:
            raise ValueError("pad_size: expected a size for label maps, else it depends on the largest image.")
        sides = []
        for name, pixels in zip(("height", "width"), resized, strict=True):
            start, length = 0, pixels
            if do_center_crop:
                length = getattr(crop_size, name)
                start = int((pixels - length) / 2)  # rounded towards zero; negative if the image was padded
            if do_pad:
                length = getattr(pad_size, name)
            sides.append(_VisibleSide(start, length, pixels))
        return sides[0], sides[1]

    def _resized_size(self, height: int, width: int, size: SizeDict) -> tuple[int, int]:
        """Let transformers turn `size` into the height and width that an image is resized to."""
        plane = np.zeros((1, height, width), dtype=np.uint8)
        height, width = PilBackend.resize(self, plane, size, resample=PILImageResampling.NEAREST).shape[1:]
        return height, width

    def _validate_preprocess_kwargs(self, **kwargs: Unpack[APMImageProcessorKwargs]) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        if kwargs.get("data_format") not in (None, "channels_first", ChannelDimension.FIRST):
            raise ValueError(f"`data_format` must be 'channels_first', got {kwargs['data_format']!r}.")
        if kwargs.get("do_normalize"):
            mean, std = np.asarray(kwargs["image_mean"]), np.asarray(kwargs["image_std"])
            counts = {values.size for values in (mean, std) if values.ndim}
            if len(counts) > 1 or 0 in counts or not (np.isfinite(mean).all() and 0 < std.min() <= std.max() < np.inf):
                raise ValueError(
                    "`image_mean` and `image_std` must be one number or as many finite ones as images have channels, "
                    f"the std positive, got {kwargs['image_mean']} and {kwargs['image_std']}."
                )


class APMImageProcessorPil(APMImageProcessorBase, PilBackend):
    """Turn images into APM's `pixel_values` `(B, C, S_h, S_w)`, float32, with PIL and NumPy.

    Takes a PIL image of any mode, a path or URL, a NumPy array or torch tensor `(H, W)`, `(H, W, C)` or `(C, H, W)`, a
    4-D batch of those, or lists of any of these; see the top of this file for how pixels and channels are read and
    [`APMImageProcessorKwargs`] for the options. Steps: channels, resize, centre crop, rescale and normalize (or
    min-max instead), channel order, padding. Every option may also be given per call.

    Raises:
        ValueError: for an unreadable or empty image, another type, a number of channels that does not fit, NaN or
            infinite pixels, or values outside their range; the message names the image's position in the batch.
    """

    def process_image(self, image: Any, **options: Any) -> np.ndarray:
        """Read one image as `(C, H, W)`, `uint8` or `float32`; see [`read_image`]."""
        return self.read(image, **options).cpu().numpy()

    def resize(
        self, image: np.ndarray, size: SizeDict, resample: PILImageResampling | int | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Resize `(C, H, W)` with PIL at the image's depth, per channel; transformers supports only 8 bits.

        PIL would treat four channels as RGBA and weight the first three by the last.
        """
        if image.dtype == np.uint8:
            resize = super().resize
            return np.concatenate([resize(plane[None], size, resample=resample, **kwargs) for plane in image])
        height, width = self._resized_size(image.shape[1], image.shape[2], size)
        white = 1.0 if image.max() <= 1 else 255.0
        resized = [PIL.Image.fromarray(channel).resize((width, height), resample=resample) for channel in image]
        return np.stack([np.asarray(channel) for channel in resized]).clip(0, white)  # bicubic overshoots at edges

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs: Any) -> np.ndarray:
        """Crop `(C, H, W)`, padding a smaller image with zeros; odd rows or columns come last, as in torchvision."""
        rows, cols = max(0, (size.height or 0) - image.shape[1]), max(0, (size.width or 0) - image.shape[2])
        image = np.pad(image, ((0, 0), (rows // 2, rows - rows // 2), (cols // 2, cols - cols // 2)))
        return super().center_crop(image, size, **kwargs)

    def min_max(self, image: np.ndarray) -> np.ndarray:
        """Scale `(C, H, W)` to [0, 1] by its minimum and maximum; zeros if they are equal."""
        image = image.astype(np.float32)
        low, high = image.min(), image.max()
        return (image - low) / (high - low if high > low else np.float32(1))

    def _preprocess(
        self,
        images: list[np.ndarray],
        *,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
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
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        pixel_values = []
        for image in images:
            if do_resize:
                image = self.resize(image, size, resample=resample)
            if do_center_crop:
                image = self.center_crop(image, crop_size)
            if do_min_max:
                image = self.min_max(image)
            else:
                if do_rescale:
                    image = self.rescale(image, rescale_factor)
                if do_normalize:
                    image = self.normalize(image, image_mean, image_std)
            if do_flip_channel_order:
                image = image[::-1]  # (3, S_h, S_w), RGB -> BGR
            pixel_values.append(np.ascontiguousarray(image, dtype=np.float32))
        if do_pad:
            pixel_values = self.pad(pixel_values, pad_size=pad_size)
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)


APMImageProcessorPil.register_for_auto_class()  # saved processors include their code

__all__ = ["APMImageProcessorKwargs", "APMImageProcessorPil", "read_image", "upright"]
